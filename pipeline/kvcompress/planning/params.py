"""Section `budgets`: policies and sizes for which plans are made."""

from typing import Annotated

from pydantic import Field

from kvcompress.core.params import Name, SectionParams


class BudgetParams(SectionParams):
    """One plan for every policy and size.

    sizes: a share (`25%`), `512 tokens` for each head, or bytes (`40 MB`), at a context of `context_length` tokens.
    balance: value of answering every question about a far fact, nats a token of text; 0 plans for text alone.
    early: factor by which plans of `select` favour the first third of the layers beyond their prices; 1 for none.
    """

    section = "budgets"

    sizes: Annotated[list[Name], Field(min_length=1)] = ["6.25%", "12.5%", "25%", "50%"]
    policies: Annotated[list[Name], Field(min_length=1)] = ["uniform", "priced"]
    context_length: Annotated[int, Field(ge=64)] = 2048
    balance: Annotated[float, Field(ge=0)] = 0.1
    early: Annotated[float, Field(ge=1)] = 2.0
    random_seed: Annotated[int, Field(ge=0)] = 0
