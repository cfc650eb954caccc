"""Analysis of attention: head classes, the analyzer, reports and figures. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.analysis.attention_analyzer import (
        AttentionAnalyzer,
        HeadClassification,
        HeadStatistics,
        HeadType,
    )

__all__ = ["AttentionAnalyzer", "HeadClassification", "HeadStatistics", "HeadType"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("kvcompress.analysis.attention_analyzer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
