"""AttentionAnalyzer: measures and classifies the heads of a model on a text, in one object."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.analysis.classification import classify_heads
from kvcompress.analysis.params import DEFAULT_THRESHOLDS, DEFAULT_WINDOWS, ThresholdParams, WindowParams
from kvcompress.analysis.validation_report import analysis_summary
from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.statistics import compute_statistics, describe_measure
from kvcompress.core.artifacts import write_text
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadClassification, HeadType, ModelInfo, save_classifications
from kvcompress.core.head_statistics import HeadStatistics, save_statistics
from kvcompress.core.params import override
from kvcompress.models.architecture import Architecture
from kvcompress.texts.corpora import leading_tokens

__all__ = [
    "HIGH_ENTROPY_THRESHOLD",
    "HIGH_LOCAL_THRESHOLD",
    "HIGH_SINK_THRESHOLD",
    "LOW_ENTROPY_THRESHOLD",
    "AttentionAnalyzer",
    "HeadClassification",
    "HeadStatistics",
    "HeadType",
    "collect_attention",
]

LOW_ENTROPY_THRESHOLD = DEFAULT_THRESHOLDS.low_entropy
HIGH_ENTROPY_THRESHOLD = DEFAULT_THRESHOLDS.high_entropy
HIGH_LOCAL_THRESHOLD = DEFAULT_THRESHOLDS.local
HIGH_SINK_THRESHOLD = DEFAULT_THRESHOLDS.sink


class AttentionAnalyzer:
    """Measure and classify the attention heads of one model.

    Parameters
    ----------
    device: the model is moved there; None leaves it in place [default: None].
    sink_size: number of first keys that count as sinks [default: 4].
    local_window: number of last keys, the query's own included, that count as local [default: 8].
    recent_ratio: share of the visible keys, from the last, that counts as recent [default: 0.1].
    thresholds, windows: bounds and windows of the classes [default: those of `params.yaml`'s schema].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str | None = None,
        sink_size: int = 4,
        local_window: int = 8,
        recent_ratio: float = 0.1,
        thresholds: ThresholdParams = DEFAULT_THRESHOLDS,
        windows: WindowParams = DEFAULT_WINDOWS,
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.params = override(
            StatisticsParams(), sink_size=sink_size, local_window=local_window, recent_ratio=float(recent_ratio)
        )
        self.thresholds = thresholds
        self.windows = windows
        self._measured: list[tuple[Sequence[HeadStatistics], ModelInfo]] = []

    def analyze(
        self, text: str, max_tokens: int = 2048, chunk_size: int = 512
    ) -> tuple[list[HeadStatistics], list[HeadClassification]]:
        """Return statistics and refined classes of every head on the first `max_tokens` tokens of `text`.

        Raises `InputError` if the text is no longer than sinks and local window together or `max_tokens` exceeds the
        model's context, and `UnsupportedModelError` if the model's attention cannot be observed.
        """
        shape = Architecture.of_config(self.model.config)
        if not 2 <= max_tokens <= shape.max_context:
            raise InputError(f"max_tokens is {max_tokens}, expected 2 ... {shape.max_context} (the model's context)")
        ids = leading_tokens(self.tokenizer)
        ids += self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        least = self.params.sink_size + self.params.local_window + 1
        if len(ids) < least:
            raise InputError(
                f"the text has {len(ids)} tokens, expected at least {least} (sink_size + local_window + 1)"
            )
        sums = collect_attention(self.model, [torch.tensor(ids[:max_tokens])], chunk_size)
        statistics = compute_statistics(sums, self.params)
        config = self.model.config
        origin = {"model_id": config.name_or_path or type(self.model).__name__}
        origin |= {"revision": getattr(config, "_commit_hash", None), "num_key_value_heads": shape.num_key_value_heads}
        self._measured.append((statistics, describe_measure(sums, self.params, origin)))
        return statistics, classify_heads(statistics, self.thresholds, self.windows, self.params.sink_size)

    def save_results(
        self,
        stats: Sequence[HeadStatistics],
        classifications: Sequence[HeadClassification],
        output_dir: str | Path,
    ) -> None:
        """Write `head_statistics.json`, `head_classifications.json` and `analysis_summary.txt` to `output_dir`.

        Raises `InputError` for statistics that this analyzer did not return.
        """
        info = next((info for measured, info in self._measured if measured is stats), None)
        if info is None:
            raise InputError("`stats` must come from this analyzer's `analyze()`")
        output_dir = Path(output_dir)
        save_statistics(output_dir / "head_statistics.json", stats, info)
        save_classifications(output_dir / "head_classifications.json", classifications, info, "refined")
        summary = analysis_summary(info, stats, classifications)
        write_text(output_dir / "analysis_summary.txt", summary)
