"""Where in the context facts are still found: one heat map a task, contenders by depth, numbers in the cells."""

from kvcompress.evaluation.ablation_data import Rows
from kvcompress.page.markup import Html, tag
from kvcompress.page.scale import cividis, ink_on

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
    """One task as a table of coloured cells: found of asked, all context lengths together."""
    depths = sorted({cell["depth"] for cell in rows[0]["retrieval"][task]["grid"]})
    header = [tag("th", "depth", scope="col"), *(tag("th", f"{depth:.0%}", scope="col") for depth in depths)]
    header.append(tag("th", "all", scope="col"))
    body = []
    for row in rows:
        found = row["retrieval"][task]
        cells = [tag("th", row["name"], scope="row")]
        for depth in depths:
            here = [cell for cell in found["grid"] if cell["depth"] == depth]
            cells.append(score(sum(cell["correct"] for cell in here), sum(cell["total"] for cell in here)))
        interval = f"between {found['low']:.0%} and {found['high']:.0%} with 95% confidence"
        cells.append(score(found["correct"], found["total"], interval))
        body.append(tag("tr", cells))
    caption = tag("caption", tag("strong", task), f" {TASKS[task]}" if task in TASKS else None)
    shown = tag("table", caption, tag("thead", tag("tr", header)), tag("tbody", body), class_="heat")
    return tag("div", shown, class_="scroll", tabindex=0, role="region", aria_label=f"facts found: {task}")


def score(correct: int, total: int, said: str = "") -> Html:
    colour = cividis(correct / total)
    written = f"{correct}/{total}"
    return tag("td", written, style=f"background:{colour};color:{ink_on(colour)}", title=said or None)
