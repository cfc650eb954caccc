"""Section `budgets`: which plans are made."""

from typing import Annotated

from pydantic import Field, field_validator

from kvcompress.params.base import Name, SectionParams
from kvcompress.scores.table import SCORES


class BudgetParams(SectionParams):
    """One plan for every policy and budget: a share (`25%`), `512 tokens` for each head, or bytes (`40 MB`).

    Budgets count at a context of `context_length` tokens. `balance`: nats a token of text that it is worth to answer every
    question about a far fact; 0 looks at text alone. The policy `select` chooses the part `select_part` of a head's slots
    (sinks aside) by content, with `select_score` (a name of `kvcompress.scores`).
    """

    section = "budgets"

    sizes: Annotated[list[Name], Field(min_length=1)] = ["6.25%", "12.5%", "25%", "50%"]
    policies: Annotated[list[Name], Field(min_length=1)] = ["uniform", "priced"]
    context_length: Annotated[int, Field(ge=64)] = 2048
    balance: Annotated[float, Field(ge=0)] = 0.1
    select_score: Name = "expected_attention"
    select_part: Annotated[float, Field(gt=0, lt=1)] = 0.5
    random_seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("select_score")
    @classmethod
    def known(cls, name: str) -> str:
        if name not in SCORES:
            raise ValueError(f"unknown score {name!r}, expected one of {', '.join(SCORES)}")
        return name

    def selection(self) -> tuple[str, float]:
        """Score and part, as a planner takes them."""
        return self.select_score, self.select_part
