"""Checks of output paths before long work: each can be written, and none touches an input.

require_outputs({"MODEL": folder, "--text": texts}, files=[output])
"""

import os
import stat
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from tempfile import NamedTemporaryFile

from kvcompress.core.errors import InputError

Paths = str | Path | None | Iterable[str | Path]


def require_outputs(inputs: Mapping[str, Paths], files: Iterable[Path | None], folders: Iterable[Path] = ()) -> None:
    """Raise `InputError` unless every output can be written, to its own path and apart from all inputs.

    An output must not be an input, lie in one or hold one. Links are followed. Devices and pipes may be shared.

    Parameters
    ----------
    inputs: paths that are read, by the flag or field that names them.
    files: files that are written. None is skipped.
    folders: folders that are replaced as a whole.
    """
    places = [(file, False) for file in files if file is not None] + [(folder, True) for folder in folders]
    outputs = [path for path, _ in places if not is_stream(path)]
    for one, other in combinations(outputs, 2):
        if resolved(one) == resolved(other):
            raise InputError(f"two outputs are to be written to {one}: expected a path for each")
        for inner, outer in ((one, other), (other, one)):
            if resolved(outer) in resolved(inner).parents:
                raise InputError(f"the output {inner} lies in the output {outer}: expected them in different places")
    for path, folder in places:
        require_writable(path, folder)
    for name, paths in inputs.items():
        for read in [paths] if isinstance(paths, str | Path) else paths or ():
            for output in outputs:
                require_apart(output, name, read)


def require_apart(output: Path, name: str, path: str | Path) -> None:
    """Raise `InputError` if an output is the input called `name`, lies in it or holds it."""
    written, read = resolved(output), resolved(path)
    if written == read:
        found = f"would be overwritten by the output {output}"
    elif written in read.parents:
        found = f"lies in {output}, which is replaced as a whole"
    elif read in written.parents:
        found = f"is only read, but {output} would be written into it"
    else:
        return
    raise InputError(f"{name} {path} {found}: expected inputs and outputs in different places")


def require_writable(path: Path, folder: bool = False) -> None:
    """Raise `InputError` if no file (`folder`: no folder) can be put at `path`. Tries it in the nearest folder."""
    target = resolved(path)
    try:
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise InputError(f"cannot write {path}: Permission denied")
            return
        if target.exists() and target.is_dir() != folder:
            kinds = "file, expected a folder" if folder else "folder, expected a file"
            raise InputError(f"cannot write {path}: it is a {kinds}")
        above = next(place for place in target.parents if os.path.lexists(place))
        with NamedTemporaryFile(dir=above, prefix=f".{target.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def resolved(path: str | Path) -> Path:
    """Return the absolute path with all links followed. The path need not exist."""
    return Path(os.path.realpath(path))


def is_stream(path: str | Path) -> bool:
    """Return True for a device or a pipe, which is written to and never replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
