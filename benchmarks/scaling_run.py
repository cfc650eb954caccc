"""One process of a run that `scaling_cost` measures; torchrun starts it, once or several times."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from kvcompress.collect.collect import collect_attention
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import said_in_a_sentence
from kvcompress.evaluation.compare import compare
from kvcompress.evaluation.contenders import contenders_for
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.params import AblationParams
from kvcompress.models import distributed
from kvcompress.models.load import load_folder
from kvcompress.models.params import LocalModel, ModelParams
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.corpora import documents_of_all
from kvcompress.texts.retrieval_tasks import FILLER

TEXTS = 2
UNIT = 4  # documents, of which every part of the work takes a whole number


def acts(folder: Path, documents: int, tokens: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str | int]]:
    """Each stage's work on `documents` documents (what they say changes no time), and where it is done.

    All parts of the work grow with the documents, a multiple of `UNIT`, so that half of them are half of it.
    """
    params = ModelParams(source="local", local=LocalModel(path=str(folder)))
    model, tokenizer = load_folder(folder, params)
    words = FILLER * (1 + documents * tokens // len(tokenizer(FILLER).input_ids))  # twice what is needed
    texts, each = {f"text {i}": words for i in range(TEXTS)}, documents // TEXTS
    batch = documents_of_all(tokenizer, texts, tokens, each)
    priced = SensitivityParams(
        max_tokens=tokens, documents_per_text=each, joint_windows=[8 * (i + 1) for i in range(documents // UNIT)],
        fact_contexts=documents // 2, facts_per_context=2,
    )  # fmt: skip
    judged = AblationParams(
        max_tokens=tokens, documents_per_text=each, sizes=[tokens // 4, tokens // 2], retrieval_lengths=[tokens],
        retrieval_depths=documents // 2, chunk_size=256, rank_every=256,
    )  # fmt: skip
    contenders = contenders_for(["window_size"], model.config, judged)
    return {
        "collect_attention": lambda: collect_attention(model, [one for found in batch.values() for one in found]),
        "measure_sensitivity": lambda: measure_sensitivity(model, tokenizer, texts, priced),
        "ablate": lambda: compare(model, tokenizer, folder.name, texts, contenders, judged),
    }, environment(model)


def together() -> None:
    """Wait until all processes are here."""
    distributed.summed({"here": torch.zeros(1, dtype=torch.float64)})


def main(folder: Path, documents: int, tokens: int, output: Path) -> None:
    """One process of a run; the first writes the seconds of every stage to OUTPUT."""
    with said_in_a_sentence():
        begun = time.perf_counter()
        distributed.join()
        found, where = acts(folder, documents, tokens)
        together()
        seconds = {"loading": time.perf_counter() - begun}
        for name, act in found.items():
            together()
            start = time.perf_counter()
            act()
            together()
            seconds[name] = time.perf_counter() - start
        if distributed.leave():
            write_json(output, {"seconds": seconds, "environment": where})


if __name__ == "__main__":
    typer.run(main)
