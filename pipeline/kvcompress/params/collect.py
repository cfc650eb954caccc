"""Section `collect`: how calibration text is fed to the model."""

from typing import Annotated

from pydantic import Field

from kvcompress.core.params import Count, SectionParams

Error = Annotated[float, Field(gt=0)]


class CollectParams(SectionParams):
    """How calibration text is fed: `documents_per_text` documents of `max_tokens`, in chunks with a KV cache.

    With `stop_entropy_error` (nats) or `stop_sink_error` (share of attention) these are the most; after every `stop_every`
    documents collecting stops where every head's standard errors are no larger (`kvcompress.analysis.precision`).
    """

    section = "collect"

    max_tokens: Annotated[int, Field(ge=128)] = 2048
    chunk_size: Count = 512
    documents_per_text: Count = 2
    stop_entropy_error: Error | None = None
    stop_sink_error: Error | None = None
    stop_every: Count = 32
