"""The data behind `dvc plots`: small JSON lists that `dvc plots diff` lays over one another."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from kvcompress.core.artifacts import write_json
from kvcompress.core.head_classes import HeadClassification
from kvcompress.core.head_statistics import HeadStatistics


def save_plot_data(
    folder: str | Path, statistics: Sequence[HeadStatistics], classes: Sequence[HeadClassification]
) -> None:
    """Write `classes.json` (heads in each class), `layers.json` (means by layer) and `heads.json` (one row a head)."""
    folder = Path(folder)
    counts = Counter(head.head_type.value for head in classes)
    write_json(folder / "classes.json", [{"class": kind, "heads": count} for kind, count in counts.most_common()])

    by_layer: dict[int, list[HeadStatistics]] = {}
    for head in statistics:
        by_layer.setdefault(head.layer_idx, []).append(head)
    layers = []
    for layer, heads in by_layer.items():
        row = {"layer": layer, "entropy": round(fmean(head.mean_entropy for head in heads), 4)}
        row |= {region: round(fmean(h.position_preference[region] for h in heads), 4) for region in ("sink", "local")}
        layers.append(row)
    write_json(folder / "layers.json", layers)

    rows = []
    for head, found in zip(statistics, classes, strict=True):
        entry: dict[str, int | float | str] = {"layer": head.layer_idx, "head": head.head_idx}
        entry |= {"class": found.head_type.value, "window": found.recommended_window}
        entry |= {"entropy": round(head.mean_entropy, 4), "sink": round(head.sink_ratio, 4)}
        rows.append({**entry, "local": round(head.local_ratio, 4)})
    write_json(folder / "heads.json", rows)
