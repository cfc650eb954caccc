"""Compression methods behind one interface (`Compressor`): the head-aware method and the baselines.

Each method has a file of its own, with a function of the same name that compresses a cache in one call. The function
replaces the module as this package's attribute: `kvcompress.methods.l2_compress` is the function.
"""

from kvcompress.methods.ada_kv import AdaptiveCompressor
from kvcompress.methods.compressor import Compressor, PlanCompressor
from kvcompress.methods.fix_size_l2 import FixSizeL2Compressor, fix_size_l2
from kvcompress.methods.head_aware_compress import HeadAwareCompressor, HeadCompressionConfig, head_aware_compress
from kvcompress.methods.l2_compress import L2Compressor, l2_compress
from kvcompress.methods.recent_only import RecentOnlyCompressor, recent_only
from kvcompress.methods.streaming_llm import StreamingLLMCompressor, streaming_llm

__all__ = [
    "AdaptiveCompressor",
    "Compressor",
    "FixSizeL2Compressor",
    "HeadAwareCompressor",
    "HeadCompressionConfig",
    "L2Compressor",
    "PlanCompressor",
    "RecentOnlyCompressor",
    "StreamingLLMCompressor",
    "fix_size_l2",
    "head_aware_compress",
    "l2_compress",
    "recent_only",
    "streaming_llm",
]
