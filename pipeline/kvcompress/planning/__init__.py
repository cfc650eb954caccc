"""Retention plans from measured prices: budgets, policies, and the division of slots among heads."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.planning.make_plan import make_plan

__all__ = ["make_plan"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the function replaces the submodule of the same name
        globals()[name] = getattr(import_module(f"kvcompress.planning.{name}"), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
