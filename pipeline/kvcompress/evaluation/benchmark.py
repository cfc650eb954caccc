"""Speed, memory and quality of methods on one and the same run: a prompt, then the tokens that really follow it.

The tokens decoded are the text's own, so a step takes the time of a generated one and says at once how likely the right
token was. Everyone reads a prompt, then all decode a few tokens in turns, so that a busy machine slows all alike; who
begins changes from turn to turn. Prompts attend in full and are compressed at their end (exact prefill). The full cache
is what transformers does by itself: `DynamicCache`, and the model's own attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.evaluation.benchmark_methods import Entrant
from kvcompress.evaluation.benchmark_params import BenchmarkParams
from kvcompress.evaluation.decode_steps import held_bytes
from kvcompress.evaluation.timing import OwnMemory, devices_of, timed
from kvcompress.models.load import input_device
from kvcompress.texts.corpora import documents

WARM_UP_TOKENS = 128  # on a CPU, once one entrant has read a whole prompt; on a GPU all read all of it
COMPRESSIONS = 3  # timed compressions of one prompt


@dataclass
class Record:
    """What one entrant did on all samples, prompts of `prompt` tokens; times in milliseconds.

    `nll` (nats) and `correct` are `[sample][predicted token]`. `held`: bytes of K and V after every decode step;
    `peak_held`: the most at any time, growth's second copy included. `peak_device`: bytes that it alone had allocated on
    GPUs beyond the weights, None without one.
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
    """One entrant on one sample: `prefill` once, then `decode` until every token of the sample is predicted.

    `tokens` `[prompt + new]`: the last of them is never fed, only predicted. Numbers go to `record`.
    """

    def __init__(self, model: PreTrainedModel, entrant: Entrant, tokens: Tensor, record: Record) -> None:
        self.model, self.entrant, self.record = model, entrant, record
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
        """The entrant's own attention, its memory counted."""
        compressor = self.entrant.compressor
        with compressor.attached(self.model) if compressor else nullcontext(), self.memory.watched():
            yield
        self.record.peak_held = max(self.record.peak_held, self._peak())
        if self.memory.peak is not None:
            self.record.peak_device = max(self.record.peak_device or 0, self.memory.peak)

    def prefill(self) -> None:
        config, compressor = self.model.config, self.entrant.compressor
        with self.watched():
            self.cache = compressor.new_cache(config) if compressor else DynamicCache(config=config)
            logits, passed = self._pass(self.record.prompt)
            _, picked = timed(lambda: int(logits.argmax()), self.devices)
            self.record.prefill_ms.append(passed)
            self.record.first_token_ms.append(passed + picked)
            self._judge(logits)

    def decode(self, steps: int) -> None:
        """Feed up to `steps` tokens one by one; the first step is not timed, it finds processor caches of others."""
        with self.watched():
            for step in range(min(steps, self.steps_left)):
                logits, milliseconds = self._pass(1)
                if step:
                    self.record.step_ms.append(milliseconds)
                self.record.held.append(held_bytes(self.cache))
                self._judge(logits)

    def _pass(self, count: int) -> tuple[Tensor, float]:
        """Feed the next tokens: logits `[vocabulary]` after the last of them, and milliseconds."""
        ids = self.tokens[None, self.fed : self.fed + count]
        act = partial(self.model, ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        out, milliseconds = timed(act, self.devices)
        self.fed += count
        return out.logits[0, -1], milliseconds

    def _judge(self, logits: Tensor) -> None:
        right = self.tokens[self.fed].to(logits.device)
        self.record.nll[-1].append(float(-torch.log_softmax(logits.float(), -1)[right]))
        self.record.correct[-1].append(bool(logits.argmax() == right))

    def _peak(self) -> int:
        if isinstance(self.cache, RaggedCache):
            return self.cache.peak_nbytes
        # Growing a DynamicCache puts old and new keys of one layer side by side.
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return held_bytes(self.cache) + max(layer.keys.nbytes for layer in layers)


def samples_of(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], params: BenchmarkParams
) -> list[tuple[str, Tensor]]:
    """`num_samples` documents of prompt + new tokens, from each text in turn. Raises `InputError` for a short text."""
    names = list(islice(cycle(texts), params.num_samples))
    length = params.max_tokens + params.max_new_tokens
    found = {name: documents(tokenizer, name, texts[name], length, names.count(name)) for name in dict.fromkeys(names)}
    return [(name, next(found[name])) for name in names]


def rotated(runs: Sequence[Run], by: int) -> list[Run]:
    by %= len(runs)
    return [*runs[by:], *runs[:by]]


def warm_up(model: PreTrainedModel, entrants: Sequence[Entrant], tokens: Tensor, params: BenchmarkParams) -> None:
    """What only happens the first time: kernels are chosen, memory is asked for."""
    short = params.max_tokens if input_device(model).type == "cuda" else min(WARM_UP_TOKENS, params.max_tokens)
    for i, entrant in enumerate(entrants):
        prompt = short if i else params.max_tokens
        run = Run(model, entrant, tokens[: prompt + 3], Record(prompt))
        run.prefill()
        run.decode(2)


def time_compression(full: Run, runs: Sequence[Run]) -> None:
    """Compress the full cache of the prompt, all entrants in turns, the first time not counted.

    Those that choose by queries are left out: they choose while they read, and their prefill's time has it.
    """
    for again in range(COMPRESSIONS + 1):
        for run in runs:
            if run.entrant.compressor and not run.entrant.compressor.needs_queries:
                act = partial(run.entrant.compressor.compress, full.cache, config=full.model.config)
                _, milliseconds = timed(act, run.devices)
                if again:
                    run.record.compress_ms.append(milliseconds)


@torch.inference_mode()
def run_benchmark(
    model: PreTrainedModel,
    samples: Sequence[tuple[str, Tensor]],
    entrants: Sequence[Entrant],
    params: BenchmarkParams,
    progress: bool = True,
) -> dict[str, Record]:
    """Every entrant's `Record` on all samples; the first entrant must be the full cache."""
    assert entrants[0].compressor is None
    records = {entrant.name: Record(params.max_tokens) for entrant in entrants}
    total = len(samples) * len(entrants) * params.max_new_tokens
    with tqdm(total=total, desc="benchmark", unit="tok", disable=not progress) as bar:
        warm_up(model, entrants, samples[0][1], params)
        for number, (text, tokens) in enumerate(samples):
            bar.set_postfix_str(text)
            runs = [Run(model, entrant, tokens, records[entrant.name]) for entrant in entrants]
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
