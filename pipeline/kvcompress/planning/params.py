"""Section `budgets`: which plans are made."""

from typing import Annotated

from pydantic import Field

from kvcompress.core.params import Name, SectionParams


class BudgetParams(SectionParams):
    """One plan for every policy and budget: a share (`25%`), `512 tokens` for each head, or bytes (`40 MB`).

    Budgets count at a context of `context_length` tokens. `balance`: nats a token of text that it is worth to answer every
    question about a far fact; 0 looks at text alone. `early`: by how much plans of `select` favour the first third of the
    layers, against the others, beyond what prices say; 1 goes by prices alone.
    """

    section = "budgets"

    sizes: Annotated[list[Name], Field(min_length=1)] = ["6.25%", "12.5%", "25%", "50%"]
    policies: Annotated[list[Name], Field(min_length=1)] = ["uniform", "priced"]
    context_length: Annotated[int, Field(ge=64)] = 2048
    balance: Annotated[float, Field(ge=0)] = 0.1
    early: Annotated[float, Field(ge=1)] = 2.0
    random_seed: Annotated[int, Field(ge=0)] = 0
