"""What the page reads besides statistics and classes: prices, the plans of one policy, and results of comparisons."""

from pathlib import Path
from typing import Any

from kvcompress.core.artifacts import read_json
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan

POLICY = "priced"
PRICE_FIELDS = {"layer", "kv_head", "price", "facts", "sinks", "window"}


def load_prices(path: str | Path) -> list[dict[str, Any]]:
    """The rows that `allocate --prices` wrote. Raises `InputError` for anything else."""
    rows = read_json(path)
    if (
        not isinstance(rows, list)
        or not rows
        or any(not isinstance(row, dict) or set(row) != PRICE_FIELDS for row in rows)
    ):
        raise InputError(
            f"{path} does not hold the prices of KV heads: every row needs {', '.join(sorted(PRICE_FIELDS))}"
        )
    return rows


def load_plans(folder: str | Path, context: int) -> dict[str, RetentionPlan]:
    """The plans of POLICY in a folder, smallest at `context` tokens first: `25%` -> plan; others by their file's label.

    Raises `InputError` where there is none.
    """
    found: dict[str, RetentionPlan] = {}
    for path in Path(folder).glob(f"{POLICY}-*.json"):
        plan, label = RetentionPlan.load(path), path.stem.removeprefix(f"{POLICY}-")
        found[f"{label}%" if "share" in plan.budget and label.replace(".", "").isdigit() else label] = plan
    if not found:
        raise InputError(f"{folder} holds no plan of the policy {POLICY!r}")
    return dict(sorted(found.items(), key=lambda item: (item[1].held(context), item[0])))


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """A report's results, a list of `{"model", "environment", "settings", "rows"}`. Raises `InputError` otherwise."""
    results = read_json(path)
    wanted = {"model", "environment", "settings", "rows"}
    complete = isinstance(results, list) and all(isinstance(one, dict) and wanted <= set(one) for one in results)
    if not complete or not results:
        raise InputError(f"{path} holds no results: expected a list of entries with {', '.join(sorted(wanted))}")
    return results
