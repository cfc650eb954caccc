"""Past the trained context: NLL per window of a text several times as long, streamed through a bounded cache.

StreamingLLM (arXiv 2309.17453) claims that sinks + window stay stable at any length if positions are counted inside the
cache. The same cache with the text's own positions, a cache without sinks and a head-aware plan stand beside it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.core.head_classes import load_classifications
from kvcompress.evaluation.perplexity import streaming_cache
from kvcompress.methods import HeadAwareCompressor, RecentOnlyCompressor, StreamingLLMCompressor
from kvcompress.methods.compressor import Compressor
from kvcompress.models import distributed
from kvcompress.models.architecture import Architecture
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import sum_over_shards
from kvcompress.planning.reference_plans import class_table_plan

WINDOW = 1024  # predicted tokens a point


def beyond_contenders(config: Any, classifications: str | None, size: int) -> dict[str, Compressor]:
    """Bounded caches of `size` slots a head, positions of cache and text, and the class table with its full heads."""
    contenders: dict[str, Compressor] = {
        f"4 + {size - 4}, positions in the cache": StreamingLLMCompressor(4, size - 4, positions="cache"),
        f"4 + {size - 4}, positions of the text": StreamingLLMCompressor(4, size - 4),
        f"0 + {size}, positions of the text": RecentOnlyCompressor(size),
    }
    if classifications:
        plan = class_table_plan(
            load_classifications(classifications), Architecture.of_config(config).num_key_value_heads
        )
        contenders["class table, positions of the text"] = HeadAwareCompressor.from_plan(plan)
    return contenders


def stream(
    model: PreTrainedModel, tokens: Tensor, contenders: Mapping[str, Compressor], chunk_size: int, progress: bool = True
) -> list[dict[str, Any]]:
    """One row a contender and window of WINDOW tokens: mean NLL in nats, and bytes held at its end.

    Processes that share the work (`kvcompress.models.distributed`) stream some contenders each.
    """
    rows, names = [], list(contenders)
    own = distributed.mine([1.0] * len(names))
    found: dict[int, Tensor] = {}  # contender -> [predicted token, (NLL, bytes held)]
    tokens = tokens.to(input_device(model))
    with torch.inference_mode(), distributed.progress(len(tokens) * len(own), "beyond context", "tok", progress) as bar:
        for i in own:
            compressor = contenders[names[i]]
            nll: list[np.ndarray] = []
            held: list[int] = []
            with compressor.attached(model):
                cache = streaming_cache(compressor, model)
                for start in range(0, len(tokens) - 1, chunk_size):
                    target = tokens[start + 1 : start + 1 + chunk_size]
                    chunk = tokens[start : start + len(target)]
                    logits = model(chunk[None], past_key_values=cache, use_cache=True).logits[0]
                    loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
                    nll.append(loss.double().cpu().numpy())
                    held += [cache.nbytes] * len(target)
                    bar.update(len(chunk))
            found[i] = torch.from_numpy(np.stack([np.concatenate(nll), held], axis=1))
    for name, measured in zip(names, distributed.in_order(found, len(names)), strict=True):
        losses, bytes_held = measured[:, 0].numpy(), sum_over_shards(measured[:, 1], model.config).numpy()
        for first in range(0, len(losses) - WINDOW + 1, WINDOW):
            last = first + WINDOW
            mean = round(float(losses[first:last].mean()), 4)
            rows.append({"name": name, "tokens": last, "nll": mean, "nbytes": int(bytes_held[last - 1])})
    return rows
