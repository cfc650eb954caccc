"""Retention plans: how a budget of cache is written and divided among heads."""
