"""kvcompress: measure every attention head of a causal language model, and keep only the KV cache that it needs.

Facts flow one way: attention sums -> head statistics -> classes and prices -> retention plan -> compressed cache -> reports.
Public names load on first use, so importing this package imports nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionAnalyzer": "kvcompress.analysis",
    "HeadAwareCompressor": "kvcompress.methods",
    "RetentionPlan": "kvcompress.core.plan",
    "make_plan": "kvcompress.planning",
}
__all__ = ["AttentionAnalyzer", "HeadAwareCompressor", "RetentionPlan", "make_plan"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = import_module(_HOMES[name])
        lazily = vars(home).get("__getattr__")  # asked first: a file of the same name may have been imported before
        return lazily(name) if lazily else getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
