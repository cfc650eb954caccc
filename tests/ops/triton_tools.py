"""Device of the kernel tests: a CUDA device, or triton's interpreter on a CPU.

The interpreter has to be chosen before triton is loaded, so without a CUDA device the tests run again in another
process.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def release(package):
    """Major and minor version."""
    return tuple(int(number) for number in version(package).split(".")[:2])


needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (CUDA or INTERPRETED), reason="needs triton and a CUDA device, or TRITON_INTERPRET=1"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def only_where_interpreted(test):
    """Marks the test that runs its file's others in the interpreter."""
    for condition, reason in (
        (CUDA or INTERPRETED, "the tests here run directly"),
        (
            HAS_TRITON and release("triton") < (3, 7) and release("numpy") >= (2, 4),
            "the interpreter before triton 3.7 cannot count to a number on the device with numpy 2.4",
        ),
        (not HAS_TRITON, "triton is not installed"),
    ):
        test = pytest.mark.skipif(condition, reason=reason)(test)
    return test


def run_interpreted(file: str) -> None:
    """Assert that the tests of this file pass in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout
