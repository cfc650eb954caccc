"""Size of the cache that a plan may use: a share of the full cache, tokens for each head, or bytes."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from kvcompress.core.errors import InputError

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WRITTEN = re.compile(r"([0-9]*\.?[0-9]+)\s*(%|tokens?|[KMG]?i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """`value` in the unit `kind`: share of the full cache (0 to 1), tokens for each KV head, or bytes of K and V."""

    kind: Literal["share", "tokens", "bytes"]
    value: float

    @classmethod
    def parse(cls, written: "str | float | Budget") -> "Budget":
        """Read `0.25`, `"25%"`, `"512 tokens"` or `"40 MB"`. Raises `InputError` for anything else."""
        if isinstance(written, Budget):
            return written
        if isinstance(written, int | float) and not isinstance(written, bool):
            return cls("share", float(written)).checked(written)
        found = WRITTEN.fullmatch(written.strip()) if isinstance(written, str) else None
        if not found:
            raise InputError(
                f"the budget is {written!r}, expected a value such as 0.25, '25%', '512 tokens' or '40 MB'"
            )
        value, unit = float(found[1]), found[2].upper()
        if unit == "%":
            return cls("share", value / 100).checked(written)
        if unit.startswith("TOKEN"):
            return cls("tokens", value).checked(written)
        return cls("bytes", value * UNITS[unit]).checked(written)

    def checked(self, written: object) -> "Budget":
        """Return self. Raises `InputError` for a budget of nothing, or a share above 1."""
        limit = 1 if self.kind == "share" else math.inf
        if not 0 < self.value <= limit:
            raise InputError(f"the budget is {written!r}, expected more than 0 and at most the full cache")
        return self

    @property
    def label(self) -> str:
        """Part of file names: `25`, `6.25` (percent), `512tokens`, `40MB`."""
        if self.kind == "share":
            return f"{100 * self.value:g}"
        return f"{self.value:g}tokens" if self.kind == "tokens" else f"{self.value / 1e6:g}MB"

    def slots(self, heads: int, context: int, bytes_per_slot: int) -> int:
        """Slots over all `heads` KV heads at a context of `context` tokens, at most those of the full cache.

        bytes_per_slot: bytes of one key and one value. Raises `InputError` for less than one slot a head.
        """
        full = heads * context
        wanted = {
            "share": self.value * full,
            "tokens": self.value * heads,
            "bytes": self.value / bytes_per_slot,
        }[self.kind]
        found = min(int(wanted + 1e-6), full)
        if found < heads:
            raise InputError(
                f"a budget of {self.value:g} ({self.kind}) leaves less than one slot for each of {heads} KV heads"
            )
        return found
