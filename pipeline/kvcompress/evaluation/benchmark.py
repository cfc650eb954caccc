"""Speed, memory and quality of methods on the same prompts and the tokens that follow them in the text.

Decoding the text's own tokens takes the time of generating and gives their likelihood as well. All methods read a prompt,
then decode a few tokens in turns, so that a busy machine slows all of them alike; the first to decode changes from turn to
turn. Prompts attend in full and are compressed at their end (exact prefill). The full cache is the default of
transformers: `DynamicCache` and the model's own attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError
from kvcompress.evaluation.contenders import Contender
from kvcompress.evaluation.decode_steps import decode_growth, held_bytes, require_room, weight_bytes
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.intervals import BLOCK, paired_difference
from kvcompress.evaluation.params import FULL, BenchmarkParams
from kvcompress.evaluation.timing import (
    OwnMemory,
    Spread,
    copy_bandwidth,
    devices_of,
    process_peak_bytes,
    timed,
    times_faster,
)
from kvcompress.models.load import input_device
from kvcompress.texts.corpora import documents

WARM_UP_TOKENS = 128  # on a CPU, after the first method has read a whole prompt; on a GPU all read a whole prompt
COMPRESSIONS = 3  # timed compressions of one prompt
NOTHING_TO_COMPRESS = "keeps everything"
SELECTS_WHILE_READING = "selects by the prompt's queries while it reads: see prefill"
FEWEST_BLOCKS = 8  # of neighbouring tokens, for a bootstrap
NO_DEVICE_MEMORY = "on a CPU methods cannot be told apart: see process_peak_bytes"


@dataclass
class Record:
    """Measurements of one contender on all samples, with prompts of `prompt` tokens. Times are milliseconds.

    Parameters
    ----------
    nll, correct: negative log-likelihood (nats), and whether the most likely token was right: `[sample][token]`.
    held: bytes of keys and values after each decode step.
    peak_held: the most bytes at any time, with the second copy that growing takes.
    peak_device: bytes that the contender alone had allocated on GPUs beyond the weights, None without a GPU.
    """

    prompt: int
    prefill_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    compress_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    nll: list[list[float]] = field(default_factory=list)
    correct: list[list[bool]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    peak_held: int = 0
    peak_device: int | None = None


class Run:
    """One contender on one sample: `prefill` once, then `decode` until every token of the sample is predicted.

    tokens `[prompt + new]`: the last of them is only predicted. Measurements go to `record`.
    """

    def __init__(self, model: PreTrainedModel, contender: Contender, tokens: Tensor, record: Record) -> None:
        self.model, self.contender, self.record = model, contender, record
        self.tokens, self.fed = tokens.to(input_device(model)), 0
        self.devices = devices_of(model)
        self.memory = OwnMemory(self.devices)
        self.cache: Any = None
        record.nll.append([])
        record.correct.append([])

    @property
    def steps_left(self) -> int:
        return len(self.tokens) - 1 - self.fed

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Attach the contender and count its memory."""
        compressor = self.contender.compressor
        with compressor.attached(self.model) if compressor else nullcontext(), self.memory.watched():
            yield
        self.record.peak_held = max(self.record.peak_held, self._peak())
        if self.memory.peak is not None:
            self.record.peak_device = max(self.record.peak_device or 0, self.memory.peak)

    def prefill(self) -> None:
        config, compressor = self.model.config, self.contender.compressor
        with self.watched():
            self.cache = compressor.new_cache(config) if compressor else DynamicCache(config=config)
            logits, passed = self._pass(self.record.prompt)
            _, picked = timed(lambda: int(logits.argmax()), self.devices)
            self.record.prefill_ms.append(passed)
            self.record.first_token_ms.append(passed + picked)
            self._score(logits)

    def decode(self, steps: int) -> None:
        """Feed up to `steps` tokens one by one. The first is not timed: processor caches hold another method's data."""
        with self.watched():
            for step in range(min(steps, self.steps_left)):
                logits, milliseconds = self._pass(1)
                if step:
                    self.record.step_ms.append(milliseconds)
                self.record.held.append(held_bytes(self.cache))
                self._score(logits)

    def _pass(self, count: int) -> tuple[Tensor, float]:
        """Feed the next tokens; return logits `[vocabulary]` after the last of them, and milliseconds."""
        ids = self.tokens[None, self.fed : self.fed + count]
        act = partial(self.model, ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        out, milliseconds = timed(act, self.devices)
        self.fed += count
        return out.logits[0, -1], milliseconds

    def _score(self, logits: Tensor) -> None:
        right = self.tokens[self.fed].to(logits.device)
        self.record.nll[-1].append(float(-torch.log_softmax(logits.float(), -1)[right]))
        self.record.correct[-1].append(bool(logits.argmax() == right))

    def _peak(self) -> int:
        if isinstance(self.cache, RaggedCache):
            return self.cache.peak_nbytes + self.cache.evidence_nbytes
        # Growing a DynamicCache holds old and new keys of one layer at once.
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return held_bytes(self.cache) + max(layer.keys.nbytes for layer in layers)


def samples_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], params: BenchmarkParams
) -> list[tuple[str, Tensor]]:
    """Return `num_samples` documents of prompt + new tokens, from each text in turn.

    Raises `InputError` for a text too short.
    """
    names = list(islice(cycle(texts), params.num_samples))
    length = params.max_tokens + params.max_new_tokens
    found = {name: documents(tokenizer, name, texts[name], length, names.count(name)) for name in dict.fromkeys(names)}
    return [(name, next(found[name])) for name in names]


def rotated(runs: Sequence[Run], by: int) -> list[Run]:
    by %= len(runs)
    return [*runs[by:], *runs[:by]]


def warm_up(model: PreTrainedModel, contenders: Sequence[Contender], tokens: Tensor, params: BenchmarkParams) -> None:
    """Run every contender untimed, so that kernels are chosen and memory is allocated."""
    short = params.max_tokens if input_device(model).type == "cuda" else min(WARM_UP_TOKENS, params.max_tokens)
    for i, contender in enumerate(contenders):
        prompt = short if i else params.max_tokens
        run = Run(model, contender, tokens[: prompt + 3], Record(prompt))
        run.prefill()
        run.decode(2)


def time_compression(full: Run, runs: Sequence[Run]) -> None:
    """Time how long compressing the full cache of the prompt takes, in turns; the first round is not counted.

    Contenders that select by queries are left out: they do so while they read, and it counts as prefill.
    """
    for again in range(COMPRESSIONS + 1):
        for run in runs:
            if run.contender.compressor and not run.contender.compressor.needs_queries:
                act = partial(run.contender.compressor.compress, full.cache, config=full.model.config)
                _, milliseconds = timed(act, run.devices)
                if again:
                    run.record.compress_ms.append(milliseconds)


@torch.inference_mode()
def run_benchmark(
    model: PreTrainedModel,
    samples: Sequence[tuple[str, Tensor]],
    contenders: Sequence[Contender],
    params: BenchmarkParams,
    progress: bool = True,
) -> dict[str, Record]:
    """Return every contender's record on all samples. The first contender must be the full cache."""
    assert contenders[0].compressor is None
    records = {one.name: Record(params.max_tokens) for one in contenders}
    total = len(samples) * len(contenders) * params.max_new_tokens
    with tqdm(total=total, desc="benchmark", unit="tok", disable=not progress) as bar:
        warm_up(model, contenders, samples[0][1], params)
        for number, (text, tokens) in enumerate(samples):
            bar.set_postfix_str(text)
            runs = [Run(model, one, tokens, records[one.name]) for one in contenders]
            for run in rotated(runs, number):
                run.prefill()
                bar.update()
            time_compression(runs[0], runs)
            turn = number
            while runs[0].steps_left:
                for run in rotated(runs, turn):
                    before = run.fed
                    run.decode(params.turn)
                    bar.update(run.fed - before)
                turn += 1
    return records


def spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in Spread.of(values)._asdict().items()}


def nll_change(nll: np.ndarray, full: np.ndarray) -> dict[str, float | None]:
    """Return the mean of `nll - full`, both `[sample, token]`, with its interval if there are tokens enough for one."""
    if len(nll) * (nll.shape[1] // BLOCK) < FEWEST_BLOCKS:
        return {"mean": round(float((nll - full).mean()), 5), "low": None, "high": None}
    return {name: round(value, 5) for name, value in paired_difference(nll, full)._asdict().items()}


def benchmark_rows(
    contenders: Sequence[Contender], records: Mapping[str, Record], weights: int
) -> list[dict[str, Any]]:
    """Return one row a contender, in their order: medians with percentiles, quality, and ratios to the full cache.

    weights: bytes of the model, which `peak_device_bytes` includes. A number that cannot be had is None, and `notes` says
    why. `to_full` holds the median of the ratios of times, step by step, the share of mean bytes, the ratio of
    perplexities, and the difference of NLL in nats a token with its bootstrap interval.
    """
    full = records[FULL]
    full_nll = np.array(full.nll)
    rows = []
    for contender in contenders:
        record = records[contender.name]
        nll = np.array(record.nll)
        change = nll_change(nll, full_nll)
        step = Spread.of(record.step_ms).median
        notes = {}
        if change["low"] is None:
            notes["nll"] = f"{nll.size} tokens are too few for an interval"
        if not record.compress_ms:
            notes["compress_ms"] = SELECTS_WHILE_READING if contender.compressor else NOTHING_TO_COMPRESS
        if record.peak_device is None:
            notes["peak_device_bytes"] = NO_DEVICE_MEMORY
        row: dict[str, Any] = {
            "name": contender.name,
            "method": contender.family,
            "settings": contender.settings,
            "prefill_tokens_per_s": round(1000 * record.prompt / Spread.of(record.prefill_ms).median, 2),
            "first_token_ms": spread(record.first_token_ms),
            "decode_tokens_per_s": round(1000 / step, 2),
            "decode_ms": spread(record.step_ms),
            "compress_ms": spread(record.compress_ms) if record.compress_ms else None,
            "bytes_mean": round(float(np.mean(record.held))),
            "bytes_peak": record.peak_held,
            "peak_device_bytes": None if record.peak_device is None else weights + record.peak_device,
            "tokens": nll.size,
            "perplexity": round(float(np.exp(nll.mean())), 4),
            "accuracy": round(float(np.mean(record.correct)), 4),
            "to_full": {
                "decode_times_faster": round(times_faster(full.step_ms, record.step_ms), 4),
                "first_token_times_faster": round(times_faster(full.first_token_ms, record.first_token_ms), 4),
                "bytes_share": round(float(np.mean(record.held) / np.mean(full.held)), 4),
                "perplexity_ratio": round(float(np.exp((nll - full_nll).mean())), 4),
                "nll": change,
            },
        }
        rows.append({**row, "notes": notes} if notes else row)
    return rows


def require_fit(params: BenchmarkParams, max_context: int, model: str, growing: bool) -> None:
    """Raise `InputError` if prompt and new tokens, or with `growing` a context, do not fit the model."""
    length = params.max_tokens + params.max_new_tokens
    if length > max_context:
        raise InputError(
            f"benchmark.max_tokens + max_new_tokens is {length}, but the context of {model} ends at {max_context}"
        )
    if growing:
        require_room(params, max_context, model)


def benchmark_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    texts: dict[str, str],
    contenders: Sequence[Contender],
    params: BenchmarkParams,
    growing: bool,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure contenders (the full cache first) on `texts` (name -> text).

    Parameters
    ----------
    name: the model's.
    growing: time single decode steps at growing context too.

    Returns `{"model", "environment", "settings", "samples", "rows", "weight_bytes", "copy_bytes_per_s", "growth",
    "process_peak_bytes"}`. Raises `InputError` if a text is too short for the samples.
    """
    samples = samples_of(tokenizer, texts, params)
    records = run_benchmark(model, samples, contenders, params, progress)
    weights = sum(weight.nbytes for weight in model.parameters())
    bandwidth = copy_bandwidth(input_device(model))
    plans = {one.name: one.plan for one in contenders if one.plan}
    result: dict[str, Any] = {"model": name, "environment": environment(model), "settings": params.model_dump()}
    result |= {"samples": [text for text, _ in samples], "rows": benchmark_rows(contenders, records, weights)}
    result |= {"weight_bytes": weight_bytes(model), "copy_bytes_per_s": round(bandwidth)}
    result |= {"growth": decode_growth(model, plans, params, bandwidth, progress) if growing else []}
    return result | {"process_peak_bytes": process_peak_bytes()}
