"""The cost benchmark runs and measures what it says; how long anything takes is not tested."""

from pathlib import Path

from typer.testing import CliRunner

from benchmarks import collect_cost
from benchmarks.collect_cost import WAYS
from kvcompress.core.artifacts import read_json
from tests.tiny import save_tiny


def test_every_way_is_measured(tmp_path: Path) -> None:
    app = collect_cost.typer.Typer()
    app.command()(collect_cost.main)
    folder, output = save_tiny("llama", tmp_path / "tiny"), tmp_path / "cost.json"
    flags = ["--lengths", "100,200", "--chunk-size", "50", "--repeats", "1", "--output", str(output)]
    result = CliRunner().invoke(app, [str(folder), *flags])
    assert result.exit_code == 0, result.output
    rows = read_json(output)["rows"]
    assert [row["tokens"] for row in rows] == [100, 200]
    for row in rows:
        assert all(row[f"{way}_s"] > 0 and row[f"{way}_mb"] >= 0 for way in WAYS)
        assert row["to_plain"] > 0
