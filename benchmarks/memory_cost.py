"""What a compressed cache takes from the machine: resident memory of fresh processes, and a soak.

    python -m benchmarks.memory_cost resident MODEL_FOLDER --context 8000 --share 0.25
    python -m benchmarks.memory_cost soak --tokens 50000

`resident` lets one process a contender read the same random text through the model, in chunks, and compares what the
operating system then says of them with what the caches say of themselves. `soak` decodes a long text with a bounded
plan on a tiny random model and watches memory and logits. Both end with exit code 1 where the claim does not hold.
Neither measures time or quality.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcompress.core.errors import said_in_a_sentence
from kvcompress.evaluation.decode_steps import plan_of
from kvcompress.methods import HeadAwareCompressor, StreamingLLMCompressor
from kvcompress.models.architecture import Architecture

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Argument(help="Model folder; with --random-weights a config.json is enough.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of text.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")]
Random = Annotated[bool, typer.Option(help="Build the model from its config, untrained.")]


def resident_bytes() -> int:
    """Bytes of this process in RAM, freed memory given back first (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS line")


@app.command(hidden=True)
@torch.no_grad()
def one(folder: Folder, share: float, context: Context, chunk: Chunk, random_weights: Random = False) -> None:
    """One contender in this process; a share of 0 stands for `DynamicCache`."""
    config = AutoConfig.from_pretrained(folder)
    if random_weights:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    compressor = HeadAwareCompressor.from_plan(plan_of(config, context, share or 1.0, 0.0))
    cache = compressor.new_cache(config, "streaming") if share else DynamicCache(config=config)
    ids = torch.randint(0, config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    with compressor.attached(model):
        model(ids[:, :chunk], use_cache=False, logits_to_keep=1)  # what a pass leaves behind in any case
        before = resident_bytes()
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        after = resident_bytes()
    shape = Architecture.of_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * 4 * shape.num_layers * shape.num_key_value_heads * size * context
    held = cache.nbytes if share else dense
    typer.echo(json.dumps({"resident": after, "grown": after - before, "held": held}))


@app.command()
def resident(
    folder: Folder,
    share: Annotated[float, typer.Option(help="Share of the slots kept.")] = 0.25,
    context: Context = 8000,
    chunk: Chunk = 256,
    random_weights: Random = False,
) -> None:
    """Compare fresh processes with a compressed cache and with DynamicCache: saved and predicted bytes, within 10 %."""
    found = {}
    # The fresh processes have to find this very kvcompress, installed or not.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for part in (0.0, share):
        command = [sys.executable, "-m", "benchmarks.memory_cost", "one", str(folder), str(part)]
        command += ["--context", str(context), "--chunk", str(chunk), *(["--random-weights"] * random_weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            typer.echo(done.stderr, err=True)
            raise typer.Exit(1)
        found[part] = json.loads(done.stdout.splitlines()[-1])
    saved = found[0.0]["resident"] - found[share]["resident"]
    predicted = found[0.0]["held"] - found[share]["held"]
    result = {"DynamicCache": found[0.0], f"{share:.0%}": found[share], "saved": saved, "predicted": predicted}
    typer.echo(json.dumps({**result, "saved / predicted": round(saved / predicted, 3)}))
    if abs(saved - predicted) > 0.1 * predicted:
        raise typer.Exit(1)


@app.command()
@torch.no_grad()
def soak(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens to decode.")] = 50_000,
    positions: Annotated[str, typer.Option(help="original, or cache to renumber inside the cache.")] = "original",
) -> None:
    """Decode a long text with 4 sinks and a window of 60 on a tiny random model: flat memory, finite logits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with said_in_a_sentence():
        compressor = StreamingLLMCompressor(4, 60, positions=positions)  # type: ignore[arg-type]
    cache = compressor.new_cache(config, "streaming")
    token, finite, readings = torch.zeros(1, 1, dtype=torch.long), True, []
    with compressor.attached(model):
        for step in range(tokens):
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1:]
            finite = finite and bool(logits.isfinite().all())
            token = torch.multinomial(logits[0].softmax(-1), 1)
            if step >= 500 and step % (tokens // 10) == tokens // 10 - 1:
                readings.append((step + 1, cache.nbytes, cache.peak_nbytes, resident_bytes()))
    flat = len({(held, peak) for _, held, peak, _ in readings}) == 1
    drift = readings[-1][3] - readings[0][3]
    for step, held, _, rss in readings:
        typer.echo(f"{step:>7} tokens  cache {held:,} bytes  resident {rss / 1e6:,.1f} MB")
    typer.echo(json.dumps({"finite": finite, "cache_flat": flat, "resident_drift_bytes": drift, "seen": cache.seen}))
    if not (finite and flat and drift < 8e6):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
