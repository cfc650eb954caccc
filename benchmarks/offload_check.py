"""Does a model that is partly offloaded give what it gives on one device?

    python -m benchmarks.offload_check data/model --output offload.json
    python -m benchmarks.offload_check        # a random Llama of 1.1 billion parameters

The model first lies on one device as a whole, then every other layer of it elsewhere, as `device_map` does with what does
not fit: in the CPU's memory where there is a GPU, else on disk. Compared are the statistics of every head and the logits
read through a compressed cache. Ends with exit code 1 where they differ.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvcompress.collect.collect import collect_attention
from kvcompress.collect.sums import HEAD_SUMS
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import said_in_a_sentence
from kvcompress.evaluation.environment import environment
from kvcompress.methods import StreamingLLMCompressor
from kvcompress.models.load import input_device, resolve_device

TOLERANCE = 1e-4  # of weights and entropies a query; float32 rounds, and kernels may differ between places


def random_llama() -> PreTrainedModel:
    """1.1 billion parameters, float32: 4.4 GB."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def split(model: PreTrainedModel, device: torch.device, scratch: str) -> PreTrainedModel:
    """Every other decoder layer, and the output layer, away from `device`; accelerate brings their weights when they run."""
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
    """Sums of every head a query, and logits of the last chunk read through a cache of 4 sinks and a window of 124."""
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


def main(
    folder: Annotated[Path | None, typer.Argument(help="Model folder; without one, a random Llama.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the document.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """The largest difference between a model on one device and the same model partly offloaded."""
    with said_in_a_sentence(), TemporaryDirectory() as scratch:
        place = resolve_device(device)
        options = {"dtype": torch.float32, "use_safetensors": True}
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options) if folder else random_llama()
        model = loaded.eval().to(place)
        where, count = environment(model), sum(parameter.numel() for parameter in model.parameters())
        vocabulary = model.get_input_embeddings().num_embeddings
        document = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
        whole = measured(model, document)
        model = split(model, place, scratch)
        away = sum(parameter.numel() for parameter in model.parameters() if parameter.device.type == "meta")
        apart = measured(model, document)
        differences = {name: float((whole[name] - apart[name]).abs().max()) for name in whole}
    largest = max(differences, key=lambda name: differences[name])
    print(f"{away / count:.0%} of {count / 1e6:,.0f} million parameters offloaded, {where['device']}, {tokens} tokens")
    print(f"largest difference: {differences[largest]:.3g} ({largest})")
    if output:
        about = {"model": folder.resolve().name if folder else "random Llama", "parameters": count, "offloaded": away}
        write_json(output, {**about, "tokens": tokens, "environment": where, "differences": differences})
    if not away or differences[largest] > TOLERANCE:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
