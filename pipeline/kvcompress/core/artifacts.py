"""Artifacts: JSON, text and safetensors files, written atomically and never pickled.

Content goes to a temporary file in the folder of the target, is flushed to disk and renamed. A full disk, an exception
or a killed process leaves the old file or none, never half of a new one. Reading turns every defect of a file (missing,
not UTF-8, truncated, NaN) into an `InputError` that names the file.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvcompress.core.errors import InputError
from kvcompress.core.outputs import is_stream, resolved

if TYPE_CHECKING:
    from torch import Tensor

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; its content replaces `path` on success, and it is removed on any exception.

    The temporary file lies next to the target and is renamed. A link is followed: its target is replaced, the link
    stays. A device or a pipe is written to. Raises `InputError` if the file system refuses (no space, no permission, a
    folder in the way).
    """
    target, stream = resolved(path), is_stream(path)
    temporary: Path | None = None
    try:
        if not stream:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = None if stream else target.parent
        with NamedTemporaryFile(dir=folder, prefix=f".{target.name}.", suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
        yield temporary
        if stream:
            with temporary.open("rb") as content, Path(path).open("wb") as open_stream:
                shutil.copyfileobj(content, open_stream)
            return
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` on success; on any exception `folder` stays unchanged.

    A link is followed: its target is replaced, the link stays. Raises `InputError` if the file system refuses, or if
    `folder` is a file.
    """
    target = resolved(folder)
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, expected a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as scratch:
            made = Path(scratch, target.name)
            made.mkdir()
            yield made
            swap(made, target)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def swap(made: Path, place: Path) -> None:
    """Rename the folder `made` to `place`. An old folder is renamed first, deleted last, and renamed back on failure.

    The last of several concurrent writers wins. Raises `OSError` if the file system refuses, and `InputError` with the
    old folder's present path if it cannot be renamed back.
    """
    aside = Path(mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".old"))
    moved: list[Path] = []
    try:
        while True:
            with suppress(FileNotFoundError):
                moved.append(place.rename(aside / str(len(moved))))
            try:
                made.rename(place)
                break
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these: another writer was faster
                    raise
    except BaseException as failure:
        if moved:
            try:
                moved[-1].rename(place)
            except OSError as error:
                raise InputError(f"cannot write {place}: {failure}; the old folder is now {moved[-1]}") from error
        with suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path and rename its file to `path`.

    The content may have taken hours. If `path` refuses it, it goes to a new temporary folder, which the `InputError`
    names.
    """
    try:
        with atomic_path(path) as temporary:
            write(temporary)
    except InputError as error:
        raise InputError(f"{error}{written_elsewhere(path, write)}") from error


def written_elsewhere(path: str | Path, write: Callable[[Path], None]) -> str:
    """Write the content of `path` to a new temporary folder. Return the end of an error that names it, "" on failure."""
    folder = ""
    try:
        folder = mkdtemp(prefix="kvcompress-")
        place = Path(folder, Path(path).name)
        write(place)
    except (OSError, InputError):
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f"; the content is in {place} instead"


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, with newlines unchanged; see `write_atomically`."""
    write_atomically(path, lambda place: put_text(place, text))


def put_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, two-space indent, keys in order. Raises `InputError` for NaN or infinity."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        loose = json.dumps(value, indent=2, ensure_ascii=False)
        elsewhere = written_elsewhere(path, lambda place: put_text(place, loose + "\n"))
        raise InputError(f"cannot write {path}: a value is NaN or infinite ({error}){elsewhere}") from error
    write_text(path, text + "\n")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file with universal newlines."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: str | Path) -> Any:
    """Read strict JSON. Raises `InputError` for NaN, infinities and duplicate keys."""

    def refuse(constant: str) -> None:
        raise InputError(f"{path} holds {constant}, which is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputError(f"{path} has the key {key!r} twice in one object")
            result[key] = value
        return result

    text = read_text(path)
    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not complete JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error


def read_model(path: str | Path, model: type[Model]) -> Model:
    """Read JSON into a pydantic model. Raises `InputError` that names the first defect by its place in the file."""
    value = read_json(path)
    return validated(lambda: model.model_validate(value), str(path))


def validated(build: Callable[[], Model], where: str) -> Model:
    """Run a pydantic validation; turn its first error into an `InputError` that starts with `where`."""
    try:
        return build()
    except ValidationError as error:
        raise InputError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Turn a pydantic error into one sentence: field, defect, value found, and the number of other defects."""
    first, *others = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"]) or "the whole"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    elif first["type"] == "missing":
        message = "this field is missing"
    elif first["type"] != "value_error" or first["loc"]:
        shown = repr(first["input"])
        message += f" (found {shown if len(shown) <= 60 else shown[:57] + '...'})"
    return f"{field}: {message}" + (f" (and {len(others)} more)" if others else "")


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. `header` is stored as one JSON string, so that bytes are reproducible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"kvcompress": json.dumps(header, sort_keys=True, allow_nan=False)}

    def write(place: Path) -> None:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place, metadata=metadata)
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error

    write_atomically(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read a file of `write_tensors`: (tensors on the CPU, header). Raises `InputError` for any other file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"cannot read {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error}") from error
    if "kvcompress" not in metadata:
        raise InputError(f"{path} was not written by kvcompress: its header has no 'kvcompress' entry")
    try:
        return tensors, dict(json.loads(metadata["kvcompress"]))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the 'kvcompress' entry of its header is not a JSON object: {error}") from error
