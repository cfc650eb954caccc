"""Prices of every KV head in one file, from which plans for any budget are made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kvcompress.core.artifacts import read_tensors, write_tensors
from kvcompress.core.errors import InputError

SHRINK = 0.2  # weight of the mean over heads in a head's curve, because few documents measured it
TENSORS = {"fisher": 3, "joint": 3, "retrieval": 3, "chosen": 3, "lost": 4}  # name -> dimensions
HEADER = ("windows", "sinks", "context", "tokens", "joint_tokens", "origin", "choices")


class SelectOption(NamedTuple):
    """Use of `size` slots besides sinks: the share `part` holds keys selected by `score`, the others a window."""

    score: str
    part: float
    size: int

    @property
    def selected(self) -> int:
        return selected_count(self.size, self.part)

    @property
    def window(self) -> int:
        return self.size - self.selected


def selected_count(size: int, part: float) -> int:
    """Selected keys among `size` slots: the share `part`, rounded; at least one slot stays for the window."""
    return min(round(part * size), size - 1)


@dataclass
class Sensitivity:
    """Measured prices of a model's KV heads, as sums over documents.

    fisher: text, nats, `[window, layer, kv_head]`; a window w means `sinks` first and w last keys.
    joint: all heads together, nats, `[joint window, layer, kv_head]`.
    retrieval: what the head carries of a fact's answer, nats a token of the answer, `[fact, layer, kv_head]`.
    chosen: text, nats, `[option, layer, kv_head]`, for the options `choices`.
    lost: what the head loses of `retrieval` under an option, `[fact, option, layer, kv_head]`.
    tokens, joint_tokens: number of tokens summed over. context: tokens of a document.
    origin: model_id, revision, num_attention_heads, texts, dtype.
    """

    windows: list[int]
    sinks: int
    context: int
    tokens: int
    joint_tokens: int
    fisher: np.ndarray
    joint: np.ndarray
    retrieval: np.ndarray
    origin: dict[str, Any]
    choices: list[SelectOption]
    chosen: np.ndarray
    lost: np.ndarray

    @property
    def layers(self) -> int:
        return int(self.fisher.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.fisher.shape[2])

    def prices(self) -> np.ndarray:
        """Expected cost of every window on text, nats a token, `[window, layer, kv_head]`; falls with the window.

        A head's own price times the rate of its layer (joint price over the sum of its heads' own prices, over all
        windows; scaled to keep the sum over all heads), drawn by SHRINK to the mean over heads.
        """
        return self._priced(self.fisher)

    def option_prices(self) -> np.ndarray:
        """Expected cost of every option, `[option, layer, kv_head]`, computed like `prices` for each score and part."""
        found = np.zeros_like(self.chosen)
        for of in self.option_groups().values():
            found[of] = self._priced(self.chosen[of])
        return found

    def option_groups(self) -> dict[tuple[str, float], list[int]]:
        """Indices of the options of every (score, part), by size."""
        found: dict[tuple[str, float], list[int]] = {}
        for i, option in enumerate(self.choices):
            found.setdefault((option.score, option.part), []).append(i)
        return found

    def _priced(self, fisher: np.ndarray) -> np.ndarray:
        single = fisher / self.tokens * self._rates()[:, None]
        priced = (1 - SHRINK) * single + SHRINK * single.mean((1, 2), keepdims=True)
        return np.maximum.accumulate(priced[::-1], 0)[::-1]

    def _rates(self) -> np.ndarray:
        """Joint price of a layer's heads over the sum of their own prices, `[layer]`."""
        alone = (self.fisher / self.tokens).sum((0, 2))
        together = (self.joint / self.joint_tokens).clip(0).sum((0, 2))
        if together.sum() <= 0:
            return np.ones_like(alone)
        rate = np.divide(together, alone, out=np.zeros_like(alone), where=alone > 0)
        return np.asarray(rate * (alone.sum() / (alone * rate).sum()))

    def require_model(self, model_id: str, revision: str, path: str | Path) -> None:
        """Raise `InputError` if the prices in `path` were measured on another model."""
        if (self.origin.get("model_id"), self.origin.get("revision")) != (model_id, revision):
            raise InputError(f"{path} was measured on {self.origin.get('model_id')}, the model is {model_id}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in TENSORS}
        write_tensors(path, tensors, {name: getattr(self, name) for name in HEADER})

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read a file of prices. Raises `InputError` if it is incomplete or holds values that are not finite."""
        tensors, header = read_tensors(path)
        if set(tensors) != set(TENSORS) or set(header) != set(HEADER):
            raise InputError(f"{path} does not hold the prices of a model's heads; measure again")
        for name, tensor in tensors.items():
            if tensor.dim() != TENSORS[name] or tensor.shape[-2:] != tensors["fisher"].shape[-2:]:
                raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, expected the heads of fisher")
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds values that are not finite")
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        choices = [SelectOption(*option) for option in header.pop("choices")]
        return cls(**header, choices=choices, **arrays)
