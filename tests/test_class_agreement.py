"""Two classifications compared head by head."""

from pathlib import Path

import pytest

from kvcompress.errors import InputError
from kvcompress.evaluation.class_agreement import compare_classes
from kvcompress.heads import HeadClassification, HeadType, save_classifications


def write(path: Path, kinds: list[HeadType]) -> Path:
    heads = [HeadClassification(0, i, kind, 0.5) for i, kind in enumerate(kinds)]
    save_classifications(path, heads)
    return path


def test_counts_and_names_what_differs(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [HeadType.MIXED] * 4)
    second = write(tmp_path / "b.json", [HeadType.MIXED] * 3 + [HeadType.GATHERING])
    result = compare_classes(first, second)
    assert (result["same_class"], result["same_class_share"], result["same_retention_share"]) == (3, 0.75, 1.0)
    assert result["changes"] == [{"layer": 0, "head": 3, "first": "mixed", "second": "gathering"}]
    with pytest.raises(InputError, match="has 4 heads and .* 2"):
        compare_classes(first, write(tmp_path / "c.json", [HeadType.MIXED] * 2))
