"""The page around the sections: style and script inline, and a policy that forbids the browser every request."""

from pathlib import Path

from kvcompress.core.artifacts import read_text
from kvcompress.reporting.page.markup import Html, joined, tag
from kvcompress.reporting.page.sections import Inputs, sections

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(inputs: Inputs) -> str:
    """The whole page; the same inputs give the same bytes."""
    info, found = inputs.statistics.model_info, sections(inputs)
    model = info.model_id or "unknown model"
    kv_heads = 1 + max(row["kv_head"] for row in inputs.prices)
    shape = f"{info.num_layers} layers, {info.num_heads} query heads and {kv_heads} KV heads each"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"kvcompress: {model}"),
        tag("style", Html(read_text(HERE / "page.css"))),
    )
    links = tag("nav", (tag("a", one.title, href=f"#{one.key}") for one in found), aria_label="Sections")
    top = tag("header", tag("h1", f"kvcompress: {model}"), tag("p", f"KV-cache compression by head: {shape}."), links)
    blocks = [
        tag("section", tag("h2", one.title, id=f"{one.key}-title"), one.content, id=one.key,
            aria_labelledby=f"{one.key}-title")
        for one in found
    ]  # fmt: skip
    extras = [tag("div", id="tip", hidden=True), tag("div", id="said", aria_live="polite", class_="unseen")]
    body = tag("body", top, tag("main", blocks), extras, tag("script", Html(read_text(HERE / "page.js"))))
    return "<!DOCTYPE html>\n" + joined([Html('<html lang="en">\n'), head, "\n", body, Html("\n</html>\n")])
