"""Memory of compressed caches as the operating system sees it, and models that lie on several devices.

    python -m benchmarks.memory resident MODEL_FOLDER --context 8000 --share 0.25
    python -m benchmarks.memory offload                              # a random Llama of 1.1 billion parameters
    python -m benchmarks.memory offload MODEL_FOLDER --output offload.json
    python -m benchmarks.memory resident --tiny                      # either in seconds, to try it

`resident` reads the same random text through the model in fresh processes, one with `DynamicCache` and one with a
compressed cache, and compares the difference of their resident memory with what the caches report (Linux).

`offload` first runs a model on one device, then with every other layer elsewhere, as `device_map` places what does not
fit: in the memory of the CPU if there is a GPU, else on disk. It compares the statistics of all heads, and the log
probabilities that a compressed cache gives.

Both end with exit code 1 if the claim does not hold. Neither measures time or quality; `benchmarks.decode steps` finds
the largest batch that fits a GPU.
"""

import ctypes
import gc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from benchmarks import _models, _timing
from benchmarks.decode import Device, Output, Tiny
from kvcompress.collect.collect import collect_attention
from kvcompress.collect.sums import HEAD_SUMS
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.decode_steps import held_bytes, plan_of
from kvcompress.methods import HeadAwareCompressor, StreamingLLMCompressor
from kvcompress.models.load import input_device

TOLERANCE = 1e-4  # of weights and entropies a query: float32 rounds, and kernels differ between devices
MUCH_CACHE = LlamaConfig(  # 262 MB of it at 500 tokens, and little model
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip
app = typer.Typer(add_completion=False, help="Measure memory.")


@torch.no_grad()
def read(folder: Path | None, share: float, context: int, chunk: int) -> tuple[int, int]:
    """Resident bytes of this fresh process after `context` tokens, and bytes that the cache holds; share 1 is dense."""
    cpu = torch.device("cpu")
    model = (
        _models.model_of(folder, torch.float32, cpu) if folder else _models.random_model(MUCH_CACHE, torch.float32, cpu)
    )
    config, ids = model.config, _models.random_tokens(model, context)[None]
    compressor = HeadAwareCompressor.from_plan(plan_of(config, context, share, 0.0))
    cache = DynamicCache(config=config) if share == 1 else compressor.new_cache(config, "streaming")
    with compressor.attached(model):
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
    return _timing.resident_bytes("VmRSS"), held_bytes(cache)


@app.command()
def resident(
    folder: Annotated[Path | None, typer.Argument(help="Model folder; not with --tiny.")] = None,
    share: Annotated[float, typer.Option(help="Share of the slots kept.")] = 0.25,
    context: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 8000,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 256,
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Compare the resident memory of fresh processes with a compressed cache and with DynamicCache, within 10 %."""
    with said_in_a_sentence():
        if (folder is None) != tiny:
            raise InputError("expected a model folder, or --tiny without one")
        context = 500 if tiny else context
        runs = {part: _timing.in_fresh_process(read, folder, part, context, chunk) for part in (1.0, share)}
    rows = [
        {"cache": "DynamicCache" if part == 1 else f"{part:.0%}", "resident_mb": resident / 1e6, "held_mb": held / 1e6}
        for part, (resident, held) in runs.items()
    ]
    saved, predicted = (runs[1.0][i] - runs[share][i] for i in (0, 1))
    _timing.show(f"{context} tokens: {saved / predicted:.3f} of the predicted bytes saved", rows)
    about = _timing.machine(torch.device("cpu"), torch.float32) | {"context": context, "share": share}
    _timing.publish(about | {"rows": rows, "saved": saved, "predicted": predicted}, output)
    if abs(saved - predicted) > 0.1 * predicted:
        raise typer.Exit(1)


def split(model: PreTrainedModel, device: torch.device, scratch: str) -> PreTrainedModel:
    """Place every other decoder layer and the output layer away from `device`; accelerate fetches their weights."""
    from accelerate import dispatch_model

    away = "cpu" if device.type == "cuda" else "disk"
    decoder = model.base_model
    names = {module: name for name, module in model.named_modules()}
    places: dict[str, Any] = {}
    for child in decoder.children():
        if isinstance(child, torch.nn.ModuleList):
            places |= {names[layer]: (away if i % 2 else device) for i, layer in enumerate(child)}
        else:
            places[names[child]] = device
    places |= {names[child]: away for child in model.children() if child is not decoder}
    return dispatch_model(model.cpu(), places, main_device=device, offload_dir=scratch, force_hooks=True)


@torch.no_grad()
def measured(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Sums of every head a query, and log probabilities of the last chunk, read through 4 sinks and a window of 124."""
    sums = collect_attention(model, [tokens], 256)
    queries = sums.tensors["queries"]
    found = {
        name: sums.tensors[name] / queries.view(-1, *[1] * (sums.tensors[name].dim() - 1))
        for name in HEAD_SUMS
        if not name.endswith("_by_document")
    }
    compressor = StreamingLLMCompressor(4, 124)
    with compressor.attached(model):
        cache = compressor.new_cache(model.config, "streaming")
        for chunk in tokens.to(input_device(model)).split(128):
            logits = model(chunk[None], past_key_values=cache, use_cache=True).logits
    return found | {"log_probabilities": logits.float().log_softmax(-1).cpu()}


@app.command()
def offload(
    folder: Annotated[Path | None, typer.Argument(help="Model folder; without one, a random Llama.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the document.")] = 1024,
    device: Device = "auto",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Compare a model on one device with the same model partly offloaded."""
    with said_in_a_sentence(), TemporaryDirectory() as scratch:
        where, name = _timing.device_of(device), folder.resolve().name if folder else "tiny" if tiny else "llama-1b"
        if folder:
            model = _models.model_of(folder, torch.float32, where)
        else:
            model = _models.random_model(_models.config_of(name), torch.float32, where)
        count = sum(parameter.numel() for parameter in model.parameters())
        document = _models.random_tokens(model, 256 if tiny else tokens)
        whole = measured(model, document)
        model = split(model, where, scratch)
        away = sum(parameter.numel() for parameter in model.parameters() if parameter.device.type == "meta")
        apart = measured(model, document)
        differences = {name: float((whole[name] - apart[name]).abs().max()) for name in whole}
    rows = [{"of": name, "largest": largest} for name, largest in differences.items()]
    _timing.show(f"{away / count:.0%} of {count / 1e6:,.0f} million parameters offloaded", rows)
    about = _timing.machine(where, torch.float32) | {"model": name, "parameters": count, "offloaded": away}
    _timing.publish(about | {"tokens": len(document), "differences": differences}, output)
    if not away or max(differences.values()) > TOLERANCE:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
