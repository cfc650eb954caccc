"""Retention plans from measured prices: budgets, policies, and the division of slots."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
