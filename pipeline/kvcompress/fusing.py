"""Fewer launches in a model's pass: what lies between the matrix products of a layer, compiled into single kernels.

A decode step has little to compute and much to launch: the rotation of queries and keys alone is a dozen launches a
layer, an RMS norm eight. `torch.compile` makes one or two of each, and of a layer norm, one launch anyway, one that
is twice as fast for a single token a row. Only the plain parts are compiled, layer by layer
with one compilation for all: norms, MLPs and the function `apply_rotary_pos_emb` of the model's own file. The cache
and the attention stay as they are. Results differ from the model's own by rounding alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

BACKEND = "inductor"
ROTATION = "apply_rotary_pos_emb"


class FusedParts:
    """The compiled parts of one model; nothing is compiled before the first pass with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._rotations: list[tuple[Any, Callable[..., Any], Callable[..., Any]]] = []
        files: dict[str, Any] = {}
        for module in model.modules():
            name = type(module).__name__
            if name.endswith(("Norm", "MLP")):
                self._forwards.append((module, _compiled(module.forward)))
            elif name.endswith("Attention"):
                files[type(module).__module__] = sys.modules[type(module).__module__]
        for file in files.values():
            rotation = getattr(file, ROTATION, None)
            if rotation is not None:
                self._rotations.append((file, rotation, _compiled(rotation)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Here the model runs with them. The rotation is exchanged for all models of its file: not for several threads."""
        try:
            for module, forward in self._forwards:
                module.forward = forward
            for file, _, fused in self._rotations:
                setattr(file, ROTATION, fused)
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)
            for file, rotation, _ in self._rotations:
                setattr(file, ROTATION, rotation)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    fused: Callable[..., Any] = torch.compile(function, backend=BACKEND, dynamic=False)
    return fused
