"""Cost of collecting attention: against a plain forward pass, over the length of a document, over processes.

    python -m benchmarks.collect cost MODEL_FOLDER --output collect_cost.json
    python -m benchmarks.collect cost --lengths 8192,32768,131072 --rounds 1 --output long_document_cost.json
    python -m benchmarks.collect scaling MODEL_FOLDER --output scaling.json
    python -m benchmarks.collect cost --tiny                         # in seconds, to try it

`cost` runs the decoder, without its output layer, over the same tokens in three ways that take turns: `plain`, whole
with SDPA; `chunked`, in chunks with a KV cache; and `observed`, in the same chunks. The peak of memory is that of
observing in a fresh process, above the loaded model, split into the keys and values that the cache holds at the end and
everything else (Linux, or a GPU). Without a folder the model is random, with one layer and one head, so that little
hides the rest.

`scaling` times the stages that share documents, in one process and in several. Strong scaling: the same documents.
Weak scaling: one process with its share of them. Time runs from the moment all processes have loaded the model until
all have the result. On a CPU every process has one thread, so use no more processes than cores.

Nothing here changes or checks a statistic.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from benchmarks import _models, _timing
from benchmarks.decode import Device, Output, Tiny
from kvcompress.collect.collect import collect_attention
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, KVCompressError, said_in_a_sentence
from kvcompress.evaluation.compare import compare
from kvcompress.evaluation.contenders import ablation_contenders
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.params import AblationParams
from kvcompress.evaluation.timing import timed
from kvcompress.models import distributed
from kvcompress.models.load import load_folder
from kvcompress.models.params import LocalModel, ModelParams
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.corpora import documents_of_all
from kvcompress.texts.retrieval_tasks import FILLER

app = typer.Typer(add_completion=False, help="Time the collection of attention.")
Chunk = Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")]

# ---- Against a plain forward pass ----

WAYS = ("plain", "chunked", "observed")
ONE_HEAD = LlamaConfig(
    vocab_size=256, hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=2**20,
)  # fmt: skip


def loaded(folder: Path | None, device: torch.device) -> PreTrainedModel:
    if folder is None:
        return _models.random_model(ONE_HEAD, torch.float32, device)
    return _models.model_of(folder, torch.float32, device)


def forward(model: PreTrainedModel, tokens: torch.Tensor, way: str, chunk_size: int) -> None:
    """Run one pass over `tokens` in one of `WAYS`."""
    if way == "observed":
        collect_attention(model, [tokens], chunk_size, progress=False)
        return
    cache = DynamicCache() if way == "chunked" else None
    size = chunk_size if way == "chunked" else len(tokens)
    with torch.inference_mode():
        for chunk in tokens.to(model.device).split(size):
            model.base_model(chunk[None], past_key_values=cache, use_cache=cache is not None)


def peak_bytes(folder: Path | None, device: torch.device, length: int, chunk_size: int) -> int:
    """Peak bytes of observing one document above the loaded model, in this fresh process."""
    model = loaded(folder, device)
    forward(model, _models.random_tokens(model, min(length, 2048)), "observed", chunk_size)  # one-time costs
    act = partial(forward, model, _models.random_tokens(model, length), "observed", chunk_size)
    return _timing.peak_above(act, device)


@app.command()
def cost(
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder; without one, a random layer of one head.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "2048,4096,8192",
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns for each length.")] = 3,
    device: Device = "auto",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time and memory of collecting attention, against a plain forward pass over the same tokens."""
    # Of the fresh processes: the threshold otherwise grows, and freed blocks stay in the process.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with said_in_a_sentence():
        where = _timing.device_of(device)
        model, rows = loaded(folder, where), []
        config = model.config
        slot = 2 * config.num_hidden_layers * _models.kv_heads(config) * _models.head_size(config) * 4  # bytes a token
        for length in map(int, ("100" if tiny else lengths).split(",")):
            tokens, seconds = _models.random_tokens(model, length), {}
            for way in WAYS:
                forward(model, tokens[:64], way, chunk_size)
            acts = {way: partial(timed, partial(forward, model, tokens, way, chunk_size), [where]) for way in WAYS}
            for way, found in _timing.in_turns(acts, rounds, warm_up=0).items():
                seconds[way] = median(spent for _, spent in found) / 1000
            peak = _timing.in_fresh_process(peak_bytes, folder, where, length, chunk_size)
            row: dict[str, float] = {"tokens": length} | {f"{way}_s": round(seconds[way], 3) for way in WAYS}
            row |= {f"to_{way}": round(seconds["observed"] / seconds[way], 3) for way in WAYS[:2]}
            row |= {
                "cache_mb": round(slot * length / 1e6, 1),
                "beside_cache_mb": round((peak - slot * length) / 1e6, 1),
            }
            rows.append(row)
    _timing.show(f"collecting attention, chunks of {chunk_size}", rows)
    about = _timing.machine(where, torch.float32) | {"model": folder.resolve().name if folder else "random"}
    about |= {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    about |= {"head_dim": _models.head_size(config), "chunk_size": chunk_size, "rounds": rounds}
    _timing.publish(about | {"rows": rows}, output)


# ---- Over processes ----

TEXTS = 2
UNIT = 4  # documents, of which every stage's work takes a whole number
Folder = Annotated[Path, typer.Argument(help="Folder of a model in safetensors.")]


def stages(folder: Path, documents: int, tokens: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str | int]]:
    """Each stage's work on `documents` documents, all of which grows with their number, and the environment."""
    params = ModelParams(source="local", local=LocalModel(path=str(folder)))
    model, tokenizer = load_folder(folder, params)
    words = FILLER * (1 + documents * tokens // len(tokenizer(FILLER).input_ids))  # twice what is needed
    texts, each = {f"text {i}": words for i in range(TEXTS)}, documents // TEXTS
    batch = documents_of_all(tokenizer, texts, tokens, each)
    priced = SensitivityParams(
        max_tokens=tokens, documents_per_text=each, joint_windows=[8 * (i + 1) for i in range(documents // UNIT)],
        fact_contexts=documents // 2, facts_per_context=2,
    )  # fmt: skip
    ablated = AblationParams(
        max_tokens=tokens, documents_per_text=each, sizes=[tokens // 4, tokens // 2], retrieval_lengths=[tokens],
        retrieval_depths=documents // 2, chunk_size=256, rank_every=256,
    )  # fmt: skip
    contenders = ablation_contenders(["window_size"], model.config, ablated)
    return {
        "collect_attention": lambda: collect_attention(model, [one for found in batch.values() for one in found]),
        "measure_sensitivity": lambda: measure_sensitivity(model, tokenizer, texts, priced),
        "ablate": lambda: compare(model, tokenizer, folder.name, texts, contenders, ablated),
    }, environment(model)


@app.command(hidden=True)
def process(folder: Path, documents: int, tokens: int, result: Path) -> None:
    """Run as one process of `scaling`, started by torchrun; the first writes the seconds of every stage to RESULT."""

    def wait_for_all() -> None:
        distributed.summed({"here": torch.zeros(1, dtype=torch.float64)})

    with said_in_a_sentence():
        begun = time.perf_counter()
        distributed.join()
        found, where = stages(folder, documents, tokens)
        wait_for_all()
        seconds = {"loading": time.perf_counter() - begun}
        for name, act in found.items():
            wait_for_all()
            start = time.perf_counter()
            act()
            wait_for_all()
            seconds[name] = time.perf_counter() - start
        if distributed.leave():
            write_json(result, {"seconds": seconds, "environment": where})


def run_processes(folder: Path, processes: int, documents: int, tokens: int) -> dict[str, Any]:
    """Result of one run of fresh processes. Raises `KVCompressError` if it fails."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "seconds.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "benchmarks.collect", "process", str(folder), str(documents), str(tokens), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise KVCompressError(
                f"a run of {processes} processes failed: {(errors or [done.stderr.strip()[-300:]])[0]}"
            )
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


@app.command()
def scaling(
    folder: Folder,
    documents: Annotated[int, typer.Option(help=f"Documents in all, a multiple of {UNIT} for every process.")] = 8,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of each document.")] = 512,
    processes: Annotated[int, typer.Option(min=2, help="Processes to compare with one.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 3,
    output: Output = None,
) -> None:
    """Time every stage that shares documents in one process and in several."""
    with said_in_a_sentence():
        share, rest = divmod(documents, processes)
        if rest or share < UNIT or share % UNIT:
            raise InputError(
                f"--documents is {documents}, expected a multiple of {UNIT * processes}, so that each of {processes} "
                f"processes has the same work: {UNIT}, {2 * UNIT}, ... documents"
            )
        kinds = {"one": (1, documents), "several": (processes, documents), "share": (1, share)}
        acts = {kind: partial(run_processes, folder, count, many, tokens) for kind, (count, many) in kinds.items()}
        runs = _timing.in_turns(acts, rounds, warm_up=0)
    rows = []
    for stage in runs["one"][0]["seconds"]:
        seconds = {kind: np.array([run["seconds"][stage] for run in found]) for kind, found in runs.items()}
        rows.append(
            {"stage": stage}
            | {f"{kind}_s": round(float(np.median(values)), 2) for kind, values in seconds.items()}
            | {"faster": round(float(np.median(seconds["one"] / seconds["several"])), 2)}
            | {"weak_efficiency": round(float(np.median(seconds["share"] / seconds["several"])), 2)}
        )
    _timing.show(f"{documents} documents of {tokens} tokens, 1 and {processes} processes", rows)
    about = {"model": folder.resolve().name, "cores": os.cpu_count(), "documents": documents, "tokens": tokens}
    about |= {"processes": processes, "documents_of_a_share": share, "rounds": rounds}
    _timing.publish({**about, "environment": runs["one"][0]["environment"], "rows": rows}, output)


if __name__ == "__main__":
    app()
