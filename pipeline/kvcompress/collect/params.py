"""Sections `collect` and `statistics`: feeding calibration text, and the keys that count as sinks, local and recent."""

from typing import Annotated

from pydantic import Field, model_validator

from kvcompress.core.params import Count, SectionParams

Error = Annotated[float, Field(gt=0)]


class CollectParams(SectionParams):
    """Calibration text: `documents_per_text` documents of `max_tokens` tokens, fed in chunks with a KV cache.

    With `stop_entropy_error` (nats) or `stop_sink_error` (share of attention) that number is a maximum: after every
    `stop_every` documents, collecting stops once no head's standard errors are larger (`collect.standard_errors`).
    """

    section = "collect"

    max_tokens: Annotated[int, Field(ge=128)] = 2048
    chunk_size: Count = 512
    documents_per_text: Count = 2
    stop_entropy_error: Error | None = None
    stop_sink_error: Error | None = None
    stop_every: Count = 32


class StatisticsParams(SectionParams):
    """Keys that count as sinks, local and recent. The upper bounds are those of the collected sums."""

    section = "statistics"

    sink_size: Annotated[int, Field(ge=1, le=64)] = 4
    local_window: Annotated[int, Field(ge=1, le=64)] = 8
    recent_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1

    @property
    def recent_percent(self) -> int:
        return round(100 * self.recent_ratio)

    @model_validator(mode="after")
    def recent_is_whole_percent(self) -> "StatisticsParams":
        if self.recent_percent < 1 or abs(self.recent_percent / 100 - self.recent_ratio) > 1e-9:
            raise ValueError(f"recent_ratio is {self.recent_ratio}, expected a multiple of 0.01")
        return self
