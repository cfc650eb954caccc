"""Artifacts: JSON, text and safetensors files, written atomically and never pickled.

Content goes to a temporary file in the folder of the target, is flushed to disk and renamed. A full disk, an exception
or a killed process leaves the old file or none, never half of a new one. Reading turns every defect of a file (missing,
not UTF-8, truncated, NaN) into an `InputError` that names the file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvcompress.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; rename it to `path` on success, remove it on any exception.

    Raises `InputError` if the file system refuses (no space, no permission, a folder in the way).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` on success; on any exception `folder` stays unchanged.

    Removes what a killed process left of an earlier attempt. Raises `InputError` if the file system refuses.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as scratch:
            target = Path(scratch, folder.name)
            target.mkdir()
            yield target
            shutil.rmtree(folder, ignore_errors=True)
            target.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, with newlines unchanged."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, two-space indent, keys in order. Raises `InputError` for NaN or infinity."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"cannot write {path}: a value is NaN or infinite ({error})") from error
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
    with atomic_path(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error


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
