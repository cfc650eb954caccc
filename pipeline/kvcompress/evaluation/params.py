"""Sections `ablation`, `compare_plans` and `benchmark` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvcompress.core.params import Count, Name, Params, SectionParams

FULL, HEAD_AWARE = "full", "head_aware"
STREAMING, CONTINUATION = "streaming", "continuation"  # protocols of compare_plans
BASELINES = ("l2_compress", "fix_size_l2", "streaming_llm", "recent_only")
METHODS = (FULL, *BASELINES, HEAD_AWARE)  # of the benchmark

Length = Annotated[int, Field(ge=64)]
Task = Literal["passkey", "needle", "lookup"]  # as in texts.retrieval_tasks, which imports slowly


class ScoringParams(Params):
    """Documents to score and facts to find.

    Parameters
    ----------
    max_tokens: tokens of each document. Contenders are compared at the bytes that they hold at its end.
    documents_per_text: documents taken from each evaluation text.
    chunk_size: tokens a forward pass. Changes nothing for a plan, except how often bytes are counted.
    rank_every: tokens a forward pass for methods that rank keys after every pass. Such a pass attends in full.
    retrieval_lengths, retrieval_depths, retrieval_per_depth: tokens of the contexts, number of places in each where a
        fact is hidden, and cases of each task at each place.
    retrieval_tasks: kinds of facts.
    retrieval_prefill: "exact" compresses a context before the question is known, "streaming" while it is read.
    """

    max_tokens: Length = 1024
    documents_per_text: Count = 2
    chunk_size: Count = 256
    rank_every: Count = 64
    retrieval_lengths: Annotated[list[Length], Field(min_length=1)] = [512, 1024]
    retrieval_depths: Count = 5
    retrieval_per_depth: Count = 1
    retrieval_tasks: Annotated[list[Task], Field(min_length=1)] = ["passkey", "needle", "lookup"]
    retrieval_prefill: Literal["exact", "streaming"] = "exact"


class AblationParams(ScoringParams, SectionParams):
    """Uniform caches, sinks, and the class table with its controls.

    Parameters
    ----------
    sizes: slots of every KV head in uniform caches, sinks included.
    sink_counts: numbers of sinks that are compared at one size.
    random_seeds: number of shuffled plans.
    beyond_tokens: length of a text streamed past the trained context; 0 for none.
    """

    section = "ablation"

    sizes: Annotated[list[Annotated[int, Field(ge=16)]], Field(min_length=1)] = [64, 128, 256, 512]
    sink_counts: Annotated[list[Annotated[int, Field(ge=0, le=15)]], Field(min_length=1)] = [0, 1, 2, 4, 8]
    random_seeds: Count = 2
    beyond_tokens: Annotated[int, Field(ge=0)] = 0


class ComparePlansParams(ScoringParams, SectionParams):
    """Retention plans and published scores against uniform caches of the same bytes.

    Parameters
    ----------
    plans: names of plan files.
    streaming: plans that are also scored while a document streams in; None for all, an empty list for none.
    context: tokens of a document that are read in one exact prefill before the rest of it is scored; 0 leaves this
        protocol out.
    scores: published methods, each with the same number of slots in every head, after the exact prefill:
        names of scores, or "adaptive NAME" (Ada-KV).
    score_shares: shares of the full cache that the methods in `scores` hold.
    """

    section = "compare_plans"

    plans: Annotated[list[Name], Field(min_length=1)] = ["priced-25"]
    streaming: list[Name] | None = None
    context: Annotated[int, Field(ge=0)] = 0
    scores: list[Name] = []
    score_shares: list[Annotated[float, Field(gt=0, lt=1)]] = [0.25]

    @model_validator(mode="after")
    def consistent(self) -> "ComparePlansParams":
        unknown = sorted(set(self.streaming or ()) - set(self.plans))
        if unknown:
            raise ValueError(f"streaming has {unknown[0]!r}, which is not among plans")
        if self.context > self.max_tokens - 2:
            raise ValueError(f"context is {self.context}, expected at most max_tokens - 2 = {self.max_tokens - 2}")
        return self


class BenchmarkParams(SectionParams):
    """Speed, memory and quality of methods that decode in turns.

    Parameters
    ----------
    num_samples: prompts, taken from the evaluation texts in turn.
    max_tokens, max_new_tokens: tokens of a prompt, and of the text after it that is decoded.
    turn: tokens that a method decodes before the next method's turn. The first of them is not timed.
    share, sinks: share of the prompt that baselines keep, and how many of its first keys, where a method has sinks.
    plans: names of plan files.
    growth_contexts, growth_batches, growth_rounds: contexts and batch sizes at which single decode steps are timed, and
        how often. Without contexts there is no such timing.
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
