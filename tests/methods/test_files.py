"""Files with defects: an error that names the file's first one."""

import json

import pytest

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import Retention
from kvcompress.methods import HeadAwareCompressor


def plan_file(tmp_path, edit):
    path = tmp_path / "plan.json"
    RetentionPlan.uniform(Retention(4, 8), 2, 3, 6).save(path)
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan["heads"].append(plan["heads"][0]), "KV head 0 of layer 0 occurs twice"),
        (lambda plan: plan["heads"].pop(), "KV head 2 of layer 1 is missing"),
        (lambda plan: plan["heads"][1].update(strategy="magic"), "magic"),
        (lambda plan: plan["heads"][1].update(window_size=-3), "window_size"),
        (lambda plan: plan.update(schema=2), "plan schema 2 is not known"),
    ],
)
def test_plan_files_with_defects(tmp_path, edit, message):
    with pytest.raises(InputError, match=message):
        HeadAwareCompressor.from_plan(plan_file(tmp_path, edit))


def test_truncated_files(tmp_path):
    path = plan_file(tmp_path, lambda plan: None)
    path.write_text(path.read_text()[:-30])
    for load in (HeadAwareCompressor.from_plan, HeadAwareCompressor.from_classifications):
        with pytest.raises(InputError, match="is not complete JSON"):
            load(path)
        with pytest.raises(InputError, match="cannot read"):
            load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.append(dict(rows[0])), "head 0 of layer 0 occurs twice"),
        (lambda rows: rows.pop(1), "head 1 of layer 0 is missing"),
        (lambda rows: rows[1].update(compression_strategy="magic"), "magic"),
    ],
)
def test_classification_files_with_defects(tmp_path, edit, message):
    rows = [
        {"layer_idx": layer, "head_idx": head, "head_type": "mixed", "confidence": 0.5, "compression_strategy": "none"}
        for layer in range(2)
        for head in range(3)
    ]
    edit(rows)
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classifications": rows}))
    with pytest.raises(InputError, match=message):
        HeadAwareCompressor.from_classifications(path)
