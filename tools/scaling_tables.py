"""The tables of docs/scaling.md, made from the reports of `scaling_cost` and `long_document_cost`."""

from collections.abc import Mapping
from typing import Any

from tools.cost_tables import table

Report = Mapping[str, Any]


def scaling(report: Report) -> str:
    """Each stage's seconds in one process and in several."""
    count, where = report["processes"], report["environment"]
    rows = [
        (
            row["stage"],
            f"{row['one_s']:.1f}",
            f"{row['several_s']:.1f}",
            "" if row["stage"] == "loading" else f"{row['faster']:.2f}",
            "" if row["stage"] == "loading" else f"{row['weak_efficiency']:.2f}",
        )
        for row in report["rows"]
    ]
    made = (
        f"{report['model']}, {report['documents']} documents of {report['tokens']:,} tokens, {where['device']} with "
        f"{report['cores']} cores, {where['dtype']}, torch {where['torch']}."
    )
    return f"{made}\n\n{table(('', '1 process, s', f'{count} processes, s', 'times faster', 'weak'), rows)}"


def long(report: Report) -> str:
    """Memory against the length of a document."""
    rows = [
        (f"{row['tokens']:,}", f"{row['cache_mb']:.1f}", f"{row['beside_cache_mb']:.1f}", f"{row['seconds']:.1f}")
        for row in report["rows"]
    ]
    made = (
        f"A random model of {report['layers']} layer and {report['heads']} head of {report['head_dim']}, "
        f"{report['dtype']}, chunks of {report['chunk_size']}, torch {report['torch']}."
    )
    head = ("tokens", "keys and values, MB", "peak beside them, MB", "seconds")
    return f"{made}\n\n{table(head, rows)}"
