"""Retention plan: the retention of every KV head of one model, and its versioned JSON file, one line for each head."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from kvcompress.core.artifacts import read_model, write_text
from kvcompress.core.errors import InputError
from kvcompress.core.retention import Retention, Strategy, require_each_once

SCHEMA = 1


class PlanModel(BaseModel):
    """The model a plan was made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    num_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)


class PlanHead(BaseModel):
    """One line of a plan file; `select_size` and `score` are absent unless keys are chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int = Field(ge=0)
    kv_head: int = Field(ge=0)
    strategy: Strategy
    sink_size: int = Field(ge=0)
    window_size: int = Field(ge=-1)
    select_size: int = Field(default=0, ge=0)
    score: str = ""

    _retention: Retention = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        sizes = self.sink_size, self.window_size, self.select_size
        self._retention = Retention.from_row(self.strategy, *sizes, self.score)

    @property
    def retention(self) -> Retention:
        return self._retention


class PlanFile(BaseModel):
    """Content of a plan file, schema 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal[1] = Field(alias="schema")
    model: PlanModel
    policy: str
    budget: dict[str, float]
    made_from: dict[str, Any]
    heads: list[PlanHead]

    @field_validator("schema_", mode="before")
    @classmethod
    def known_schema(cls, value: Any) -> Any:
        if value != SCHEMA:
            raise ValueError(f"plan schema {value!r} is not known, this version reads schema {SCHEMA}")
        return value

    @model_validator(mode="after")
    def every_head_once(self) -> "PlanFile":
        expected = {(i, j) for i in range(self.model.num_layers) for j in range(self.model.num_key_value_heads)}
        require_each_once(((head.layer, head.kv_head) for head in self.heads), expected, "KV head")
        return self


def plans_of(folder: str | Path, model_id: str) -> Path:
    """Return the folder of a model's plans in a folder of plans."""
    return Path(folder) / model_id.replace("/", "--")


def named_plans(paths: Iterable[str | Path], taken: Collection[str] = ()) -> dict[str, Path]:
    """Return plan files by unique names, each file once: `a/plan` and `b/plan` for two files plan.json.

    A name is the shortest end of the path, without suffix, that no other file shares and that is not `taken`.
    """
    files = {os.path.abspath(path): Path(path) for path in paths}
    ends = {whole: path_ends(Path(whole)) for whole in files}
    shared = Counter(end for one in ends.values() for end in one)
    return {
        next(end for end in ends[whole] if shared[end] == 1 and end not in taken): path for whole, path in files.items()
    }


def path_ends(path: Path) -> list[str]:
    """Return names for an absolute path: its stem, the stem with 1, 2, ... folders before it, and the whole path."""
    parts = path.with_suffix("").parts[1:]
    return ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)] + [str(path)]


@dataclass(frozen=True)
class RetentionPlan:
    """Retention of every KV head of a model.

    Parameters
    ----------
    layers: `layers[layer][kv_head]`.
    num_attention_heads: query heads of a layer.
    model_id, policy, budget, made_from: origin of the plan.

    Raises `InputError` unless every layer has the same number of KV heads, and query heads divide evenly among them.
    """

    layers: tuple[tuple[Retention, ...], ...]
    num_attention_heads: int
    model_id: str = "unknown"
    policy: str = "custom"
    budget: dict[str, float] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or len({len(layer) for layer in self.layers}) != 1 or not self.layers[0]:
            raise InputError("a plan needs at least one layer, and the same number of KV heads in every layer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"{self.num_attention_heads} query heads cannot be shared by {self.num_key_value_heads} KV heads"
            )

    @classmethod
    def uniform(cls, kept: Retention, layers: int, kv_heads: int, query_heads: int, **origin: Any) -> "RetentionPlan":
        """Return a plan with one retention for all KV heads."""
        return cls(((kept,) * kv_heads,) * layers, query_heads, **{"policy": "uniform", **origin})

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_key_value_heads(self) -> int:
        return len(self.layers[0])

    def require_shape(self, layers: int, kv_heads: int, query_heads: int, name: str | Path) -> None:
        """Raise `InputError` if the plan called `name` is for a model of another shape."""
        found = self.num_layers, self.num_key_value_heads, self.num_attention_heads
        expected = layers, kv_heads, query_heads
        if found != expected:
            raise InputError(f"{name} is for {found} layers, KV heads and query heads, the model has {expected}")

    def held(self, seen: int) -> int:
        """Slots held after `seen` tokens, summed over layers and KV heads."""
        return sum(kept.held(seen) for layer in self.layers for kept in layer)

    def share(self, seen: int) -> float:
        """Slots held after `seen` tokens as a share of the full cache's."""
        return self.held(seen) / (self.num_layers * self.num_key_value_heads * seen)

    def nbytes(self, seen: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """Bytes of K and V held after `seen` tokens; `itemsize` in bytes an element."""
        return 2 * self.held(seen) * head_dim * itemsize * batch

    @classmethod
    def load(cls, path: str | Path) -> "RetentionPlan":
        """Read a plan file. Raises `InputError` that names the file and its first defect."""
        if Path(path).suffix == ".safetensors":
            raise InputError(
                f"{path} holds prices, not a plan; run `kvcompress plan --sensitivity {path}` to make a plan"
            )
        file = read_model(path, PlanFile)
        rows = sorted(file.heads, key=lambda head: (head.layer, head.kv_head))
        kept, width = [head.retention for head in rows], file.model.num_key_value_heads
        layers = tuple(tuple(kept[i : i + width]) for i in range(0, len(kept), width))
        try:
            return cls(layers, file.model.num_attention_heads, file.model.id, file.policy, file.budget, file.made_from)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a plan file, one line for each head."""
        heads = [
            dumps({"layer": i, "kv_head": j, **kept.to_row()})
            for i, layer in enumerate(self.layers)
            for j, kept in enumerate(layer)
        ]
        model = {
            "id": self.model_id,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
        }
        head = {"schema": SCHEMA, "model": model, "policy": self.policy}
        head |= {"budget": self.budget, "made_from": self.made_from}
        opening = dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
        write_text(path, opening + ',\n  "heads": [\n    ' + ",\n    ".join(heads) + "\n  ]\n}\n")
