"""No data is lost: outputs stay apart from inputs, and an old result stays until the new one is complete."""

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcompress.core.artifacts import read_json, read_tensors, replaced_folder, write_json, write_tensors, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.outputs import require_outputs
from kvcompress.core.plan import named_plans


def rescued_at(message: str) -> Path:
    """Return the temporary file that an error names."""
    return Path(message.split("the content is in ")[1].split(" instead")[0])


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))


def folder_with(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    return folder


def refuse_renames(monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path, Path], bool]) -> None:
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if refused(self, Path(target)):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)


def test_the_old_folder_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder_with(tmp_path / "model", "old")
    with monkeypatch.context() as patch:
        refuse_renames(patch, lambda source, target: target == place and source.parent.name.endswith(".tmp"))
        with pytest.raises(InputError, match="cannot write .*model: No space left"), replaced_folder(place) as made:
            (made / "weights").write_text("new")
    assert (place / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with replaced_folder(place) as made:
        (made / "weights").write_text("new")
    assert (place / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_folder_that_cannot_come_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder_with(tmp_path / "model", "old")
    refuse_renames(monkeypatch, lambda _, target: target == place)
    with pytest.raises(InputError, match="the old folder is now ") as caught, replaced_folder(place):
        pass
    kept = Path(str(caught.value).split("the old folder is now ")[1])
    assert (kept / "weights").read_text() == "old"


def test_two_writers_of_a_folder_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder_with(tmp_path / "model", "old")
    with replaced_folder(place) as first:
        (first / "weights").write_text("first")
        with replaced_folder(place) as second:
            (second / "weights").write_text("second")
        assert (place / "weights").read_text() == "second"
    assert (place / "weights").read_text() == "first"
    # One puts its folder there after the other has moved the old one out.
    rename, others = Path.rename, list[Path]()

    def overtaken(self: Path, target: Path) -> Path:
        if target == place and not others:
            others.append(folder_with(place, "other"))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with replaced_folder(place) as made:
        (made / "weights").write_text("last")
    assert (place / "weights").read_text() == "last"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_linked_folder_is_replaced_where_it_is_and_a_file_is_not(tmp_path: Path) -> None:
    far = folder_with(tmp_path / "disk/model", "old")
    (tmp_path / "model").symlink_to(far)
    with replaced_folder(tmp_path / "model") as made:
        (made / "weights").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert (far / "weights").read_text() == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="it is a file, expected a folder"), replaced_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_links_devices_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("far/result.json")
    for value in (1, 2):  # a link to nothing, then to a file
        write_json(link, value)
        assert link.is_symlink()
        assert read_json(tmp_path / "far/result.json") == value
    null = tmp_path / "null"
    null.symlink_to("/dev/null")  # never /dev/null itself: a fault would replace it
    write_text(null, "text")
    assert null.is_symlink()
    assert not os.path.isfile("/dev/null")
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_tensors(pipe, {"a": torch.arange(3)}, {})
    reader.join(timeout=20)
    assert pipe.is_fifo()
    (tmp_path / "copy.safetensors").write_bytes(read[0])
    assert read_tensors(tmp_path / "copy.safetensors")[0]["a"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.safetensors", "far", "link.json", "null", "pipe"]


def test_what_cannot_be_written_is_kept_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write") as caught:
        write_json(tmp_path / "file/result.json", {"hours": 9})
    assert read_json(rescued_at(str(caught.value))) == {"hours": 9}
    with pytest.raises(InputError, match="cannot write") as caught:
        write_tensors(tmp_path / "file/prices.safetensors", {"a": torch.arange(3)}, {"of": "model"})
    tensors, header = read_tensors(rescued_at(str(caught.value)))
    assert (tensors["a"].tolist(), header) == ([0, 1, 2], {"of": "model"})
    with pytest.raises(InputError, match="NaN or infinite") as caught:
        write_json(tmp_path / "result.json", {"perplexity": math.inf, "hours": 9})
    assert json.loads(rescued_at(str(caught.value)).read_text()) == {"perplexity": math.inf, "hours": 9}
    assert not (tmp_path / "result.json").exists()


def test_outputs_and_inputs_are_kept_apart(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to(model)
    text = tmp_path / "book.txt"
    text.write_text("words")
    for inputs, files, folders, message in (
        (
            {"--text": text},
            [tmp_path / "model/../book.txt"],
            [],
            "--text .*book.txt would be overwritten by the output",
        ),
        ({"--text": [text]}, [], [tmp_path], "lies in .*, which is replaced as a whole"),
        ({}, [tmp_path / "new.json"], [tmp_path], "the output .*new.json lies in the output"),
        ({"MODEL": model}, [tmp_path / "link/plan.json"], [], "MODEL .*model is only read, but .*plan.json would be"),
        ({"MODEL": tmp_path / "link"}, [], [model], "MODEL .*link would be overwritten"),
        ({"MODEL": None}, [tmp_path / "one", tmp_path / "link/../one"], [], "two outputs are to be written to"),
        ({}, [model], [], "cannot write .*model: it is a folder, expected a file"),
        ({}, [], [text], "cannot write .*book.txt: it is a file, expected a folder"),
        ({}, [text / "result.json"], [], "cannot write .*result.json: Not a directory"),
        ({}, [tmp_path / "new" / ("x" * 250)], [], "cannot write .*: File name too long"),
        ({}, [Path("/proc/result.json")], [], "cannot write /proc/result.json: "),
    ):
        with pytest.raises(InputError, match=message):
            require_outputs(inputs, files, folders)
    null = Path(os.devnull)
    require_outputs({"--text": text, "MODEL": model}, [tmp_path / "new/a.json", null, null, None], [tmp_path / "other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "link", "model"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["plans/priced-25.json", "plans/select-25.json"], ["priced-25", "select-25"]),
        (["x/a/plan.json", "y/a/plan.json", "other.json"], ["x/a/plan", "y/a/plan", "other"]),
        (["/plan.json", "/a/plan.json"], ["/plan.json", "a/plan"]),
        (["/a/plan.json", "/a/plan"], ["/a/plan.json", "/a/plan"]),
        (["a/plan.json", "./a/plan.json"], ["plan"]),
    ],
)
def test_a_plan_s_name_is_the_shortest_end_of_its_path(paths: list[str], names: list[str]) -> None:
    assert list(named_plans(paths)) == names
