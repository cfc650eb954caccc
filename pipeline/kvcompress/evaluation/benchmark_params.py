"""Section `benchmark`: what speed, memory and quality of the methods are measured on."""

from typing import Annotated

from pydantic import Field

from kvcompress.core.params import Count, Name, SectionParams

FULL, HEAD_AWARE = "full", "head_aware"
BASELINES = ("l2_compress", "fix_size_l2", "streaming_llm", "recent_only")
METHODS = (FULL, *BASELINES, HEAD_AWARE)


class BenchmarkParams(SectionParams):
    """Prompts of `max_tokens` tokens from `num_samples` evaluation documents, and the `max_new_tokens` that follow them.

    Methods decode in turns of `turn` tokens; the first of a turn is warm-up. `share`: what the baselines keep of the
    prompt, `sinks` of it first keys where a method has them. `plans`: retention plans by name that compete as well.

    `growth_*`: contexts and batches at which single decode steps are timed, `growth_rounds` times each; no contexts,
    no such timing.
    """

    section = "benchmark"

    num_samples: Count = 2
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    max_new_tokens: Annotated[int, Field(ge=3)] = 64
    turn: Annotated[int, Field(ge=2)] = 8
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    sinks: Annotated[int, Field(ge=0)] = 4
    plans: list[Name] = []
    growth_contexts: list[Annotated[int, Field(ge=32)]] = [512, 2048, 4096]
    growth_batches: Annotated[list[Count], Field(min_length=1)] = [1]
    growth_rounds: Count = 10
