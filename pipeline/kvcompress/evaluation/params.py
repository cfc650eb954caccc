"""Sections `ablation` and `compare_plans`: what methods and plans are compared on."""

from typing import Annotated, Literal

from pydantic import Field

from kvcompress.core.params import Count, Name, Params, SectionParams


class ScoringParams(Params):
    """Documents of `max_tokens` to score, and facts to find.

    Documents are fed in chunks of `chunk_size`, which changes nothing for a plan. A method that ranks keys by content does
    so after every pass and lets a pass see itself in full, so it is fed `rank_every` tokens at a time.

    Retrieval asks for a fact at `retrieval_depths` places of contexts of `retrieval_lengths` tokens, `retrieval_per_depth`
    times for each task.
    """

    max_tokens: Annotated[int, Field(ge=64)] = 1024
    documents_per_text: Count = 2
    chunk_size: Count = 256
    rank_every: Count = 64
    retrieval_lengths: Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)] = [512, 1024]
    retrieval_depths: Count = 5
    retrieval_per_depth: Count = 1
    retrieval_prefill: Literal["exact", "streaming"] = "exact"


class AblationParams(ScoringParams, SectionParams):
    """The seed's ablations: uniform caches of `sizes` slots a head, `sink_counts`, controls with `random_seeds`.

    `beyond_tokens`: length of a text streamed past the trained context; 0 for none.
    """

    section = "ablation"

    sizes: Annotated[list[Annotated[int, Field(ge=16)]], Field(min_length=1)] = [64, 128, 256, 512]
    sink_counts: Annotated[list[Annotated[int, Field(ge=0, le=15)]], Field(min_length=1)] = [0, 1, 2, 4, 8]
    random_seeds: Count = 2
    beyond_tokens: Annotated[int, Field(ge=0)] = 0


class ComparePlansParams(ScoringParams, SectionParams):
    """Retention plans by name against uniform caches of the same bytes; `max_tokens` is where the bytes are equal."""

    section = "compare_plans"

    plans: Annotated[list[Name], Field(min_length=1)] = ["priced-25"]
