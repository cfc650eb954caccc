"""How far two classifications of one model agree: another precision, device, text or threshold against the first.

Run: python -m kvcompress.evaluation.class_agreement data/refined_classifications.json other.json
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.artifacts import write_json
from kvcompress.errors import InputError
from kvcompress.heads import load_classifications


def compare_classes(first: str | Path, second: str | Path) -> dict[str, object]:
    """Share of heads with the same class, and the heads whose class differs. Raises `InputError` for other heads."""
    a, b = load_classifications(first).ordered, load_classifications(second).ordered
    if [(head.layer_idx, head.head_idx) for head in a] != [(head.layer_idx, head.head_idx) for head in b]:
        raise InputError(f"{first} has {len(a)} heads and {second} {len(b)}, or they are not the same heads")
    moved = [(one, other) for one, other in zip(a, b, strict=True) if one.head_type is not other.head_type]
    changes = [
        {"layer": one.layer_idx, "head": one.head_idx, "first": one.head_type.value, "second": other.head_type.value}
        for one, other in moved
    ]
    same_strategy = Counter(one.retention == other.retention for one, other in zip(a, b, strict=True))[True]
    return {
        "heads": len(a),
        "same_class": len(a) - len(moved),
        "same_class_share": round(1 - len(moved) / len(a), 6),
        "same_retention_share": round(same_strategy / len(a), 6),
        "changes": changes,
    }


def main(
    first: Annotated[Path, typer.Argument(help="A classification file.")],
    second: Annotated[Path, typer.Argument(help="Another of the same model.")],
    label: Annotated[str, typer.Option(help="What differs between the two, for the record.")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
) -> None:
    """Compare two classifications head by head."""
    result = compare_classes(first, second)
    print(f"{result['same_class']} of {result['heads']} heads have the same class ({result['same_class_share']:.2%})")
    if output:
        write_json(output, {"label": label, **result})


if __name__ == "__main__":
    typer.run(main)
