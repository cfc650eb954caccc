"""Prices of every KV head: one file, asked at any budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcompress.core.artifacts import read_tensors, write_tensors
from kvcompress.core.errors import InputError
from kvcompress.sensitivity.selection_outputs import Choice

SHRINK = 0.2  # how far a head's curve is drawn to the mean over heads: few documents measured it


TENSORS = {"fisher": 3, "joint": 3, "retrieval": 3, "chosen": 3, "lost": 4}  # name -> dimensions


HEADER = ("windows", "sinks", "context", "tokens", "joint_tokens", "origin", "choices")


@dataclass
class Sensitivity:
    """Sums over documents; a window w stands for `sinks` first and w last keys.

    fisher: `[window, layer, kv_head]`, nats. joint: `[joint window, layer, kv_head]`, nats. retrieval: `[fact, layer,
    kv_head]`, nats a token of the fact's answer. `tokens` and `joint_tokens` are what the sums are over, `context` the
    length of a document.

    `choices` are the ways to divide a head's slots between a window and chosen keys that were measured, for each score and
    part by size. chosen: `[choice, layer, kv_head]`, nats, as `fisher`. lost: `[fact, choice, layer, kv_head]`, what the
    head loses under it of what it carried, in the unit of `retrieval`.
    """

    windows: list[int]
    sinks: int
    context: int
    tokens: int
    joint_tokens: int
    fisher: np.ndarray
    joint: np.ndarray
    retrieval: np.ndarray
    origin: dict[str, Any]  # model_id, revision, num_attention_heads, texts, dtype
    choices: list[Choice]
    chosen: np.ndarray
    lost: np.ndarray

    @property
    def layers(self) -> int:
        return int(self.fisher.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.fisher.shape[2])

    def prices(self) -> np.ndarray:
        """Expected cost of every window on text, nats a token: `[window, layer, kv_head]`, falling with the window.

        A head's own price, times what its layer's heads cost together over what they cost one by one (both summed over
        windows, scaled so that the sum over all heads stays), drawn by SHRINK to the mean over heads.
        """
        return self._priced(self.fisher)

    def choice_prices(self) -> np.ndarray:
        """The same of every choice, `[choice, layer, kv_head]`, falling with the size within a score and part."""
        found = np.zeros_like(self.chosen)
        for kind in dict.fromkeys(choice[:2] for choice in self.choices):
            of = [i for i, choice in enumerate(self.choices) if choice[:2] == kind]
            found[of] = self._priced(self.chosen[of])
        return found

    def _priced(self, fisher: np.ndarray) -> np.ndarray:
        single = fisher / self.tokens * self._rates()[:, None]
        priced = (1 - SHRINK) * single + SHRINK * single.mean((1, 2), keepdims=True)
        return np.maximum.accumulate(priced[::-1], 0)[::-1]

    def _rates(self) -> np.ndarray:
        """What a layer's heads cost together over what they cost alone, `[layer]`."""
        alone = (self.fisher / self.tokens).sum((0, 2))
        together = (self.joint / self.joint_tokens).clip(0).sum((0, 2))
        if together.sum() <= 0:
            return np.ones_like(alone)
        rate = np.divide(together, alone, out=np.zeros_like(alone), where=alone > 0)
        return np.asarray(rate * (alone.sum() / (alone * rate).sum()))

    def require_model(self, model_id: str, revision: str, path: str | Path) -> None:
        """Raise `InputError` where what stands in `path` was measured on another model."""
        if (self.origin.get("model_id"), self.origin.get("revision")) != (model_id, revision):
            raise InputError(f"{path} was measured on {self.origin.get('model_id')}, the model is {model_id}")

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        """Both sets of documents. Raises `InputError` where models, windows or choices differ."""
        mine, theirs = (
            (one.windows, one.sinks, one.fisher.shape, [tuple(choice) for choice in one.choices])
            for one in (self, other)
        )
        if mine != theirs:
            raise InputError(
                f"sensitivities measured with {mine} and {theirs} (windows, sinks, shape, choices) cannot be added"
            )
        return Sensitivity(
            self.windows,
            self.sinks,
            max(self.context, other.context),
            self.tokens + other.tokens,
            self.joint_tokens + other.joint_tokens,
            self.fisher + other.fisher,
            self.joint + other.joint,
            np.concatenate([self.retrieval, other.retrieval]),
            self.origin,
            self.choices,
            self.chosen + other.chosen,
            np.concatenate([self.lost, other.lost]),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in TENSORS}
        write_tensors(path, tensors, {name: getattr(self, name) for name in HEADER})

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read what `save` wrote. Raises `InputError` where the file is not complete or not finite."""
        tensors, header = read_tensors(path)
        if set(tensors) != set(TENSORS) or set(header) != set(HEADER):
            raise InputError(f"{path} does not hold the sensitivity of a model's heads; measure again")
        for name, tensor in tensors.items():
            if tensor.dim() != TENSORS[name] or tensor.shape[-2:] != tensors["fisher"].shape[-2:]:
                raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, not the model's heads")
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds values that are not finite numbers")
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        choices = [Choice(*choice) for choice in header.pop("choices")]
        return cls(**header, choices=choices, **arrays)
