"""Make page.html, in which `dvc plots` shows its pictures without a network. Run: make plots-page

Takes Vega, Vega-Lite and Vega-Embed as npm installed them, puts their minified builds into one page, and the licences of
them and of all they contain into LICENSES.txt.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("vega", "vega-lite", "vega-embed")
# needed by the packages' command lines or under Node alone, and not in the builds for browsers
NOT_BUNDLED = {"commander", "node-fetch", "yargs", "iconv-lite", "rw"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: file:"
STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: #fff; color: #1a1d21; }
body { font: 1rem/1.5 system-ui, sans-serif; }
main { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; align-items: flex-start; }
main > div { max-width: 100%; overflow-x: auto; }
main img { max-width: 100%; height: auto; }
table { border-spacing: 1rem .3rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="POLICY">
<title>DVC plots</title>
<style>STYLE</style>
SCRIPTS
<script>
{
  // Pictures that a screen reader can walk through, and no link to an editor on the network.
  const embed = vegaEmbed;
  vegaEmbed = (place, spec) => embed(place, spec, { renderer: "svg", actions: { editor: false } });
}
</script>
</head>
<body>
<main>
{plot_divs}
</main>
</body>
</html>
"""


def script(modules: Path, name: str) -> str:
    """A package's build, with what DVC or a browser would read in it ruled out."""
    version = json.loads((modules / name / "package.json").read_text())["version"]
    lines = (modules / name / f"build/{name}.min.js").read_text().splitlines()
    code = "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))
    if any(mark in code for mark in ("</script", "<!--", "{scripts}", "{plot_divs}", "{refresh_tag}")):
        raise SystemExit(f"error: {name} {version} cannot stand inside a page: it holds a mark of HTML or of DVC")
    return f"<script>/* {name} {version}, see LICENSES.txt */\n{code}\n</script>"


def bundled(modules: Path) -> list[str]:
    """The packages that SCRIPTS contain, by name."""
    found, todo = set(), list(SCRIPTS)
    while todo:
        name = todo.pop()
        if name not in found | NOT_BUNDLED and not name.startswith("@types/"):
            found.add(name)
            todo += json.loads((modules / name / "package.json").read_text()).get("dependencies", {})
    return sorted(found)


def licences(modules: Path) -> str:
    """Every licence text once, under the packages that it covers; parts of Vega that come without one have Vega's."""
    covered: dict[str, list[str]] = {}
    for name in bundled(modules):
        files = [file for file in sorted((modules / name).iterdir()) if file.name.lower().startswith("licen")]
        package = json.loads((modules / name / "package.json").read_text())
        if not files and package["license"] != "BSD-3-Clause":
            raise SystemExit(f"error: {name} has no licence file")
        text = (files[0] if files else modules / "vega-view/LICENSE").read_text().strip()
        covered.setdefault(text, []).append(f"{name} {package['version']} ({package['license']})")
    rule = "\n\n" + 80 * "-" + "\n\n"
    opening = "page.html holds these packages, under these licences."
    return rule.join([opening, *(", ".join(names) + "\n\n" + text for text, names in covered.items())]) + "\n"


def main(modules: Path) -> None:
    page = PAGE.replace("POLICY", POLICY).replace("STYLE", STYLE)
    page = page.replace("SCRIPTS", "\n".join(script(modules, name) for name in SCRIPTS))
    (HERE / "page.html").write_text(page)
    (HERE / "LICENSES.txt").write_text(licences(modules))


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "node_modules")
