"""Section `collect`: how calibration text is fed to the model."""

from typing import Annotated

from pydantic import Field

from kvcompress.params.base import Count, SectionParams


class CollectParams(SectionParams):
    """How calibration text is fed: `documents_per_text` documents of `max_tokens`, in chunks with a KV cache."""

    section = "collect"

    max_tokens: Annotated[int, Field(ge=128)] = 2048
    chunk_size: Count = 512
    documents_per_text: Count = 2
