"""Where in the context facts are still found: one heat map a task, contenders by depth, numbers in the cells."""

from kvcompress.reporting.comparison_data import Rows
from kvcompress.reporting.page.markup import Html, tag
from kvcompress.reporting.page.scale import cividis, ink_on

TASKS = {
    "passkey": "a five-digit key, said twice",
    "needle": "a sentence that stands in text it does not belong to",
    "lookup": "one of several keys, asked for by name",
}


def heat_maps(rows: Rows) -> Html:
    """All tasks; contenders from most bytes to fewest."""
    ordered = sorted(rows, key=lambda row: -row["share"])
    return tag("div", (heat_map(ordered, task) for task in ordered[0]["retrieval"]), class_="heatmaps")


def heat_map(rows: Rows, task: str) -> Html:
    """One task as a table of coloured cells: facts found, all context lengths together."""
    grid = rows[0]["retrieval"][task]["grid"]
    depths = sorted({cell["depth"] for cell in grid})
    asked = sum(cell["total"] for cell in grid if cell["depth"] == depths[0])
    header = [tag("th", name, scope="col") for name in ("depth", *(f"{depth:.0%}" for depth in depths), "all")]
    body = []
    for row in rows:
        found = row["retrieval"][task]
        cells = [tag("th", row["name"], scope="row")]
        for depth in depths:
            here = [cell for cell in found["grid"] if cell["depth"] == depth]
            correct, total = sum(cell["correct"] for cell in here), sum(cell["total"] for cell in here)
            cells.append(score(correct, total, str(correct), f"{correct} of {total}"))
        interval = f"between {found['low']:.0%} and {found['high']:.0%} with 95% confidence"
        cells.append(score(found["correct"], found["total"], f"{found['correct']}/{found['total']}", interval))
        body.append(tag("tr", cells))
    words = f" {TASKS[task]};" if task in TASKS else ""
    caption = tag("caption", tag("span", tag("strong", task), f"{words} found of {asked} at each depth"))
    shown = tag("table", caption, tag("thead", tag("tr", header)), tag("tbody", body), class_="heat")
    return tag("div", shown, class_="scroll", tabindex=0, role="region", aria_label=f"facts found: {task}")


def score(correct: int, total: int, written: str, said: str) -> Html:
    colour = cividis(correct / total)
    return tag("td", written, style=f"background:{colour};color:{ink_on(colour)}", title=said)
