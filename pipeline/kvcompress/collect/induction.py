"""The induction score: does a head look back to what followed the same token before?

A sequence of random tokens is read twice in a row. An induction head, at a token of the second reading, attends to the
token after its first occurrence, `length - 1` tokens back (Olsson et al. 2022, arXiv 2209.11895). No text is needed.
"""

import torch
from transformers import PreTrainedModel

from kvcompress.collect.observer import observing
from kvcompress.collect.sums import AttentionSums
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import gather_heads

LENGTH = 128  # tokens that are repeated


def add_induction(model: PreTrainedModel, sums: AttentionSums, seed: int = 0) -> None:
    """Add one probe to `sums`, in place: each head's mean weight, in [0, 1], at distance LENGTH - 1, from LENGTH - 1 on.

    The first of these LENGTH + 1 queries still belongs to the first reading. A model whose context is too short for two
    readings gets a shorter sequence.
    """
    length = min(LENGTH, int(getattr(model.config.get_text_config(), "max_position_embeddings", 2 * LENGTH)) // 2)
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.get_input_embeddings().num_embeddings, (length,), generator=generator)
    with torch.inference_mode(), observing(model) as observer:
        model.base_model(once.repeat(2)[None].to(input_device(model)), use_cache=False)
        probe = observer.sums(sums.num_layers).tensors["relative"][..., length - 1] / (length + 1)
        sums.tensors["induction"] += gather_heads(probe, 1, model.config)
        sums.tensors["probes"] += 1
