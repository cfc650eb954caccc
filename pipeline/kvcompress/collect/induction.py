"""Induction score: attention to the token that followed the previous occurrence of the current token.

A sequence of random tokens is read twice in a row. An induction head, at a token of the second reading, attends to the
token after its first occurrence, `length - 1` tokens back (Olsson et al. 2022, arXiv 2209.11895). No text is needed.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.collect.observer import observing
from kvcompress.models.load import input_device

LENGTH = 128  # tokens of the repeated sequence; shorter for a model whose context cannot hold it twice


def induction_scores(model: PreTrainedModel, num_layers: int, seed: int = 0) -> Tensor:
    """Return the induction score of each head of this process, in [0, 1]: float64 `[layer, head]`.

    The score is the mean weight at distance LENGTH - 1 over LENGTH + 1 queries: the last token of the first reading and
    all tokens of the second.
    """
    length = min(LENGTH, int(getattr(model.config.get_text_config(), "max_position_embeddings", 2 * LENGTH)) // 2)
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.get_input_embeddings().num_embeddings, (length,), generator=generator)
    with torch.inference_mode(), observing(model) as observer:
        model.base_model(once.repeat(2)[None].to(input_device(model)), use_cache=False)
        return observer.sums(num_layers).tensors["relative"][..., length - 1] / (length + 1)
