"""The ragged per-head KV cache, the attention that reads it, and the mask oracle that judges it.

`RaggedCache` is what a model takes as `past_key_values`; `attached` lets a model read it. Plans say what is kept
(`kvcompress.plan`); `kvcompress.methods` makes caches from plans.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
