"""Measured results that are kept between runs, so that an unchanged contender is not measured again.

A result is the measurement of one contender on one document or fact. Its file is named by a hash over everything that
the result depends on: the compressor's settings, the tokens, how they are fed, the model's files, the machine, library
versions and the source code. Change any of them and the result is measured anew. Files are written atomically, one a
result, so an interrupted run continues where it ended. The folder belongs to no DVC output and may be deleted any time.
"""

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

from kvcompress.core.artifacts import atomic_path, read_json
from kvcompress.core.errors import InputError
from kvcompress.evaluation.environment import code_version
from kvcompress.methods.compressor import Compressor

KEPT_DAYS = 30  # results that are older are deleted


class ResultStore:
    """Results in `folder`.

    Parameters
    ----------
    folder: one JSON file a result. It is created with the first of them.
    origin: whatever all results of this run depend on: the model's record, the environment. JSON values.
    """

    def __init__(self, folder: Path, **origin: Any) -> None:
        self.folder, self.origin, self.writable = folder, {**origin, "code": code_version()}, True
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for path in folder.glob("*.json"):
            with suppress(OSError):  # another process may delete it at the same time
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def get(self, settings: str | None, *key: Any) -> Any | None:
        """Return the result of a compressor with these settings (`settings_of`) and the rest of its key (JSON values).

        None if there is none.
        """
        try:
            return read_json(self._path(settings, key)) if settings else None
        except InputError:
            return None

    def put(self, value: Any, settings: str | None, *key: Any) -> None:
        """Keep a result, a JSON value, unless the settings are unknown. A folder that cannot be written keeps none."""
        if settings and self.writable:
            try:
                with atomic_path(self._path(settings, key)) as path:
                    path.write_text(dumps(value, allow_nan=False), encoding="utf-8")
            except (InputError, ValueError) as error:
                self.writable = False
                warnings.warn(f"results are not kept for later runs: {error}", stacklevel=2)

    def _path(self, settings: str, key: Sequence[Any]) -> Path:
        text = dumps([self.origin, settings, *key], sort_keys=True)
        return self.folder / f"{sha256(text.encode()).hexdigest()[:40]}.json"


def settings_of(compressor: Compressor | None) -> str | None:
    """Return all settings of a compressor as text, None if they have no text and no result can be kept.

    None stands for the default cache of transformers.
    """
    if compressor is None:
        return "DynamicCache"
    text = f"{type(compressor).__name__} {sorted(vars(compressor).items())}"
    return None if " at 0x" in text else text


def hash_of(tokens: Sequence[int]) -> str:
    """Return the hash of token ids."""
    return sha256(dumps(list(tokens)).encode()).hexdigest()
