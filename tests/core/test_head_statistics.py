"""Statistics from sums: what they refuse, and the JSON file with every defect a file can have."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.statistics import compute_statistics, describe_measure
from kvcompress.collect.sums import AttentionSums
from kvcompress.core.artifacts import write_tensors
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import load_classifications
from kvcompress.core.head_statistics import load_statistics, require_same_model, save_statistics
from tests.tiny import tiny_model

ORIGIN = {"model_id": "tiny", "revision": "1", "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def sums() -> AttentionSums:
    return collect_attention(tiny_model("llama"), [torch.arange(150)], progress=False)


@pytest.fixture
def statistics_file(sums: AttentionSums, tmp_path: Path) -> Path:
    path, measure = tmp_path / "head_statistics.json", StatisticsParams()
    info = describe_measure(sums, measure, {"model_id": "tiny", "revision": "1", "num_key_value_heads": 2})
    save_statistics(path, compute_statistics(sums, measure), info)
    return path


def test_sums_survive_the_file(sums: AttentionSums, tmp_path: Path) -> None:
    sums.save(tmp_path / "a.safetensors", ORIGIN)
    sums.save(tmp_path / "b.safetensors", ORIGIN)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded, header = AttentionSums.load(tmp_path / "a.safetensors")
    assert header["model_id"] == "tiny"
    assert compute_statistics(loaded, StatisticsParams()) == compute_statistics(sums, StatisticsParams())


def test_damaged_sums_are_refused(sums: AttentionSums, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="there is no such file"):
        AttentionSums.load(path)
    sums.save(path, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        AttentionSums.load(path)
    header = {"documents": 1, "longest": 150, **ORIGIN}
    write_tensors(path, {**sums.tensors, "entropy": sums.tensors["entropy"] * float("nan")}, header)
    with pytest.raises(InputError, match="entropy holds values that are not finite"):
        AttentionSums.load(path)
    write_tensors(path, {**sums.tensors, "sinks": sums.tensors["sinks"][..., :5]}, header)
    with pytest.raises(InputError, match="sinks has the shape"):
        AttentionSums.load(path)
    write_tensors(path, {"entropy": sums.tensors["entropy"]}, header)
    with pytest.raises(InputError, match="collect again"):
        AttentionSums.load(path)
    write_tensors(path, sums.tensors, ORIGIN)
    with pytest.raises(InputError, match="its header has no 'documents'"):
        AttentionSums.load(path)
    save_file(sums.tensors, path, metadata={"kvcompress": '{"documents": 1'})
    with pytest.raises(InputError, match="is not a JSON object"):
        AttentionSums.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink_size": 65}, "sink_size"),
        ({"local_window": 65}, "local_window"),
        ({"recent_ratio": 0.123}, "recent_ratio is 0.123, expected a multiple of 0.01"),
    ],
)
def test_a_measure_that_the_sums_cannot_answer(sums: AttentionSums, changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StatisticsParams(**changes)
    assert len(compute_statistics(sums, StatisticsParams(sink_size=64, local_window=64))) == 8


def test_sinks_and_window_larger_than_the_text() -> None:
    short = collect_attention(tiny_model("llama"), [torch.arange(20)], progress=False)
    with pytest.raises(InputError, match="the longest text has 20 tokens"):
        compute_statistics(short, StatisticsParams(sink_size=12))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:-40]), "is not complete JSON"),
        (lambda p: p.write_bytes(b"\xff" + p.read_bytes()), "is not UTF-8"),
        (lambda p: edit(p, lambda c: c["head_statistics"].pop(5)), "head 1 of layer 1 is missing"),
        (lambda p: edit(p, lambda c: c["head_statistics"].append(c["head_statistics"][0])), "occurs twice"),
        (lambda p: edit(p, lambda c: c["head_statistics"][3].update(mean_entropy=float("nan"))), "NaN"),
        (
            lambda p: edit(p, lambda c: c["head_statistics"][3].update(sink_ratio="a lot")),
            "head_statistics.3.sink_ratio",
        ),
        (lambda p: edit(p, lambda c: c["head_statistics"][3].update(sink_ratio="0.5")), "head_statistics.3.sink_ratio"),
        (lambda p: edit(p, lambda c: c["head_statistics"][3].update(sink_ratio=0.987)), "sink_ratio is 0.987"),
        (
            lambda p: edit(p, lambda c: c["head_statistics"][3].update(relative_position_dist=[])),
            "relative_position_dist",
        ),
        (lambda p: edit(p, lambda c: c["head_statistics"][3].update(head_idx=9)), "head 9 of layer 0 does not exist"),
        (lambda p: edit(p, lambda c: c["head_statistics"][3].update(colour=1)), "colour"),
        (
            lambda p: edit(p, lambda c: c["head_statistics"][0]["position_preference"].pop("local")),
            "position_preference",
        ),
        (lambda p: edit(p, lambda c: c.pop("model_info")), "model_info: this field is missing"),
        (lambda p: p.unlink(), "No such file"),
    ],
)
def test_damaged_statistics_are_named(statistics_file: Path, damage, message: str) -> None:
    load_statistics(statistics_file)
    damage(statistics_file)
    with pytest.raises(InputError, match=message) as caught:
        load_statistics(statistics_file)
    assert str(statistics_file) in str(caught.value)


def test_classes_of_another_model_are_refused(statistics_file: Path, tmp_path: Path) -> None:
    statistics = load_statistics(statistics_file)
    rows = [
        {"layer_idx": i, "head_idx": j, "head_type": "mixed", "confidence": 0.5} for i in range(2) for j in range(4)
    ]
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classifications": rows}))
    require_same_model(statistics, load_classifications(path), path)
    path.write_text(json.dumps({"classifications": rows[:4]}))
    with pytest.raises(InputError, match="has 4 heads, but the statistics are of 2 layers x 4 heads"):
        require_same_model(statistics, load_classifications(path), path)
    info = {**statistics.model_info.model_dump(), "model_id": "other"}
    path.write_text(json.dumps({"model_info": info, "classifications": rows}))
    with pytest.raises(InputError, match="is of model other"):
        require_same_model(statistics, load_classifications(path), path)
