"""Compression methods: this project's head-aware one and the baselines, all behind one interface (`Compressor`).

Each lives in a file of its own name, beside a function of that name that compresses a cache in one call.
"""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Methods(ModuleType):
    """`kvcompress.methods.head_aware_compress` is the function, whichever import comes first, never the file."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Methods
