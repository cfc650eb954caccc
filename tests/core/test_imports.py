"""Imports: kvcompress and its lowest floor load no torch; public names load on first use."""

import os
import subprocess
import sys

import pytest

import kvcompress

LIGHT = """
import importlib, pkgutil, sys
import kvcompress, kvcompress.core, kvcompress.models.params, kvcompress.models.sources
for module in pkgutil.iter_modules(kvcompress.core.__path__, "kvcompress.core."):
    importlib.import_module(module.name)
print(sorted({"torch", "transformers", "safetensors", "numpy"} & set(sys.modules)))
"""


def test_core_loads_no_torch() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIGHT]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_public_names() -> None:
    from kvcompress.analysis import AttentionAnalyzer
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.methods import HeadAwareCompressor
    from kvcompress.planning import make_plan

    assert [getattr(kvcompress, name) for name in kvcompress.__all__] == [
        AttentionAnalyzer, HeadAwareCompressor, RetentionPlan, make_plan,
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="'kvcompress' has no attribute 'nothing'"):
        kvcompress.nothing  # noqa: B018
