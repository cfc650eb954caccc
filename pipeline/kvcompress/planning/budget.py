"""How much cache a plan may spend: a share of the full cache, tokens for each head, or bytes."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from kvcompress.core.errors import InputError

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WRITTEN = re.compile(r"([0-9]*\.?[0-9]+)\s*(%|tokens?|[KMG]?i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """`kind` says what `value` counts: share of the full cache (0 ... 1), tokens for each KV head, or bytes of K and V."""

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
            raise InputError(f"the budget is {written!r}, expected such as 0.25, '25%', '512 tokens' or '40 MB'")
        value, unit = float(found[1]), found[2].upper()
        if unit == "%":
            return cls("share", value / 100).checked(written)
        if unit.startswith("TOKEN"):
            return cls("tokens", value).checked(written)
        return cls("bytes", value * UNITS[unit]).checked(written)

    def checked(self, written: object) -> "Budget":
        limit = 1 if self.kind == "share" else math.inf
        if not 0 < self.value <= limit:
            raise InputError(f"the budget is {written!r}, expected more than nothing and at most the full cache")
        return self

    @property
    def label(self) -> str:
        """For file names: `25`, `6.25` (percent), `512tokens`, `40MB`."""
        if self.kind == "share":
            return f"{100 * self.value:g}"
        return f"{self.value:g}tokens" if self.kind == "tokens" else f"{self.value / 1e6:g}MB"

    def slots(self, heads: int, context: int, bytes_per_slot: int) -> int:
        """Slots over all `heads` KV heads at a context of `context` tokens, at most the full cache's.

        `bytes_per_slot`: of one key and one value. Raises `InputError` where not even one slot a head is left.
        """
        full = heads * context
        wanted = {
            "share": self.value * full,
            "tokens": self.value * heads,
            "bytes": self.value / bytes_per_slot,
        }[self.kind]
        found = min(int(wanted + 1e-6), full)
        if found < heads:
            raise InputError(f"a budget of {self.value:g} ({self.kind}) leaves less than one slot for each KV head")
        return found
