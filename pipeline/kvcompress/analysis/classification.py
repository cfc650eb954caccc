"""Classifies heads by their statistics: the first-pass taxonomy and the refined one.

Entropies (nats) grow with the text, so thresholds belong to one text length, which `model_info` records. The refined
rules and confidences reproduce all 1,024 heads of the published classification of Pythia-2.8b. A class describes the
attention of a head, not the cost of a smaller cache.
"""

from collections.abc import Sequence

from kvcompress.analysis.params import DEFAULT_THRESHOLDS, DEFAULT_WINDOWS, ThresholdParams, WindowParams
from kvcompress.core.head_classes import HeadClassification, HeadType
from kvcompress.core.head_statistics import HeadStatistics
from kvcompress.core.retention import UNBOUNDED, Strategy


def build(
    head: HeadStatistics,
    head_type: HeadType,
    confidence: float,
    strategy: Strategy = "full",
    window: int = UNBOUNDED,
    sink_size: int = 4,
) -> HeadClassification:
    """Return a classification whose flags follow from its strategy."""
    return HeadClassification(
        layer_idx=head.layer_idx,
        head_idx=head.head_idx,
        head_type=head_type,
        confidence=min(max(confidence, 0.0), 1.0),
        can_prune=strategy == "prune",
        can_limit_window=strategy in ("sink_window", "window_only"),
        recommended_window=window,
        keep_sinks=strategy == "sink_window",
        sink_size=sink_size,
        use_full_cache=strategy == "full",
        compression_strategy=strategy,
    )


def dead(head: HeadStatistics, thresholds: ThresholdParams, sink_size: int) -> HeadClassification | None:
    """Classify a head as dead if its attention is nearly uniform, so that it moves no information; else return None."""
    if head.uniformity_score >= thresholds.dead:
        return None
    return build(head, HeadType.DEAD, 1 - head.uniformity_score / thresholds.dead, "prune", 0, sink_size)


def classify_first_pass(
    head: HeadStatistics,
    thresholds: ThresholdParams = DEFAULT_THRESHOLDS,
    windows: WindowParams = DEFAULT_WINDOWS,
    sink_size: int = 4,
) -> HeadClassification:
    """Classify a head by the coarse taxonomy; the first match wins.

    dead: KL to uniform < thresholds.dead. positional: entropy < low_entropy, and sinks plus local window hold at least
    thresholds.local of the attention, so that position alone explains it. gathering: entropy >= high_entropy. mixed:
    the rest. Positional heads get the positional window, with sinks if the sink ratio is above thresholds.sink.
    """
    if found := dead(head, thresholds, sink_size):
        return found
    entropy, sink = head.mean_entropy, head.sink_ratio
    low, high = thresholds.low_entropy, thresholds.high_entropy
    if entropy < low and sink + head.local_ratio >= thresholds.local:
        strategy: Strategy = "sink_window" if sink > thresholds.sink else "window_only"
        return build(head, HeadType.POSITIONAL, sink + head.local_ratio, strategy, windows.sink_positional, sink_size)
    if entropy >= high:
        return build(head, HeadType.GATHERING, (entropy - high) / 2, sink_size=sink_size)
    return build(head, HeadType.MIXED, 0.5, sink_size=sink_size)


def classify_refined(
    head: HeadStatistics,
    thresholds: ThresholdParams = DEFAULT_THRESHOLDS,
    windows: WindowParams = DEFAULT_WINDOWS,
    sink_size: int = 4,
) -> HeadClassification:
    """Classify a head by the refined taxonomy; the first match wins.

    | class | rule | window | confidence |
    | --- | --- | --- | --- |
    | dead | KL to uniform < dead | pruned | 1 - KL / dead |
    | sink_positional | entropy < low, sink > thresholds.sink | sinks + sink_positional | sink ratio |
    | true_positional | entropy < low, local > thresholds.local | true_positional, or the wide one | (1 - entropy / low) local / thresholds.local |
    | gathering | entropy >= high | all | (entropy - high) / 2 |
    | sink_mixed | sink > thresholds.sink | sinks + min ... max, linear in entropy | sink (high - entropy) / (high - low) |
    | mixed | the rest | all | 0.5 |
    """  # noqa: E501 (a table)
    if found := dead(head, thresholds, sink_size):
        return found
    entropy, sink, local = head.mean_entropy, head.sink_ratio, head.local_ratio
    low, high = thresholds.low_entropy, thresholds.high_entropy
    if entropy < low and sink > thresholds.sink:
        return build(head, HeadType.SINK_POSITIONAL, sink, "sink_window", windows.sink_positional, sink_size)
    if entropy < low and local > thresholds.local:
        confidence = (low - entropy) / low * local / thresholds.local if thresholds.local else 1.0
        window = windows.true_positional_wide if local < windows.wide_below_local else windows.true_positional
        return build(head, HeadType.TRUE_POSITIONAL, confidence, "window_only", window, sink_size)
    if entropy >= high:
        return build(head, HeadType.GATHERING, (entropy - high) / 2, sink_size=sink_size)
    if sink > thresholds.sink:
        position = (entropy - low) / (high - low)  # 0 at the low bound, 1 at the high one
        window = int(windows.sink_mixed_min + (windows.sink_mixed_max - windows.sink_mixed_min) * position)
        return build(head, HeadType.SINK_MIXED, sink * (1 - position), "sink_window", window, sink_size)
    return build(head, HeadType.MIXED, 0.5, sink_size=sink_size)


def classify_heads(
    statistics: Sequence[HeadStatistics],
    thresholds: ThresholdParams = DEFAULT_THRESHOLDS,
    windows: WindowParams = DEFAULT_WINDOWS,
    sink_size: int = 4,
    refined: bool = True,
) -> list[HeadClassification]:
    """Classify every head, in the order of `statistics`, by the refined taxonomy or the first pass."""
    classify = classify_refined if refined else classify_first_pass
    return [classify(head, thresholds, windows, sink_size) for head in statistics]
