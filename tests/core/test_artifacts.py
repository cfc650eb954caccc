"""Artifacts are written whole or not at all, and read with a name for every defect."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompress.core.artifacts import atomic_path, read_json, read_tensors, write_json, write_text
from kvcompress.core.errors import InputError

# The file size limit makes the operating system itself refuse, as a full disk does.
REFUSED = """
import resource, signal, sys, torch
sys.path.insert(0, {pipeline!r})
from kvcompress.core.artifacts import write_json, write_tensors
from kvcompress.core.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
tensors = {{"a": torch.zeros(9999)}}
for write, value in ((write_json, (["x" * 100] * 1000,)), (write_tensors, (tensors, {{}}))):
    try:
        write({path!r}, *value)
    except InputError as error:
        print(error)
"""


def test_a_refusing_file_system_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    code = REFUSED.format(pipeline=str(Path(__file__).parents[2] / "pipeline"), path=str(path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result
    assert all(line.startswith(f"cannot write {path}: ") and "File too large" in line for line in lines), lines
    assert read_json(path) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "new.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken"):
        write_text(tmp_path / "taken", "text")
    write_text(tmp_path / "file", "text")
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "text")


def test_json_is_stable_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [1.5, "é"]})
    assert path.read_text() == json.dumps({"b": 1, "a": [1.5, "é"]}, indent=2, ensure_ascii=False) + "\n"
    with pytest.raises(InputError, match="NaN or infinite"):
        write_json(path, {"a": math.inf})
    for text, message in (
        ("[1, NaN]", "holds NaN"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[1,", "is not complete JSON"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_json(path)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    import torch

    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        read_tensors(tmp_path / "weights.safetensors")
