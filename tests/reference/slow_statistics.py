"""The slow, obvious twin of the attention sums: full maps from eager attention, one query at a time."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


def attention_maps(model: PreTrainedModel, tokens: Tensor) -> np.ndarray:
    """`[layer, head, query, key]` float64 from the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.base_model(tokens[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return np.stack([layer[0].float().numpy().astype(np.float64) for layer in maps])


def slow_statistics(
    documents: list[np.ndarray],
    sink_size: int,
    local_window: int,
    percent: int,
    windows: tuple[int | None, ...] = (),
) -> dict[str, np.ndarray]:
    """Means over all queries of all documents, `[layer, head]` each; `relative` and friends have a third axis.

    `windows` names each layer's sliding window where the model has one.
    """
    layers, heads = documents[0].shape[:2]
    result: dict[str, np.ndarray] = {}

    def add(name: str, layer: int, head: int, value: float, index: int | None = None) -> None:
        shape = (layers, heads) if index is None else (layers, heads, 4096)
        sums = result.setdefault(name, np.zeros(shape))
        sums[(layer, head) if index is None else (layer, head, index)] += value

    for maps in documents:
        for layer in range(layers):
            window = windows[layer] if windows else None
            for head in range(heads):
                for q, row in enumerate(maps[layer, head]):
                    low = 0 if window is None else max(0, q - window + 1)
                    visible = q - low + 1
                    weights = row[low : q + 1]
                    positive = weights[weights > 0]
                    entropy = float(-(positive * np.log(positive)).sum())
                    add("queries", layer, head, 1)
                    add("mean_entropy", layer, head, entropy)
                    add("squared", layer, head, entropy**2)
                    if visible > 1:
                        add("varied", layer, head, 1)
                        add("normalized_entropy", layer, head, entropy / np.log(visible))
                    add("uniformity_score", layer, head, np.log(visible) - entropy)
                    add("max_attention_mean", layer, head, weights.max())
                    recent = max(1, visible * percent // 100)
                    for k, weight in zip(range(low, q + 1), weights, strict=True):
                        distance, is_sink = q - k, k < sink_size
                        if is_sink:
                            add("sink", layer, head, weight)
                        elif distance < local_window:
                            add("local", layer, head, weight)
                        else:
                            add("global", layer, head, weight)
                        if distance < recent:
                            add("recent", layer, head, weight)
                        add("relative", layer, head, weight, distance)
                        if k >= 64:
                            add("without", layer, head, weight, distance)
    queries = result.pop("queries")
    varied = result.pop("varied")
    for name, values in result.items():
        count = varied if name == "normalized_entropy" else queries
        result[name] = values / (count[..., None] if values.ndim == 3 else count)
    result["std_entropy"] = np.sqrt(np.maximum(result.pop("squared") - result["mean_entropy"] ** 2, 0))
    return result
