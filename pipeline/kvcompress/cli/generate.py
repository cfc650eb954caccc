"""`kvcompress generate MODEL --plan plan.json`: text from a model that keeps what the plan says."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from kvcompress.cli.options import AsJson, ModelOptions, print_json, warn_of
from kvcompress.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def knows_no_more_positions(model: "PreTrainedModel") -> bool:
    """Return True if the model looks positions up in a table of limited length."""
    from torch.nn import Embedding

    tables = ("wpe", "embed_positions", "position_embeddings")
    return any(isinstance(part, Embedding) and name.endswith(tables) for name, part in model.named_modules())


def generate(
    options: ModelOptions,
    prompt: Annotated[str | None, typer.Argument(help="The prompt [default: standard input].")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file [default: the full cache].")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text that comes before the prompt, such as a document.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    prefill: Annotated[
        str, typer.Option(help="exact: the prompt attends in full; streaming: bounded memory.")
    ] = "exact",
    as_json: AsJson = False,
) -> None:
    """Generate text with a compressed cache.

    Example: `kvcompress generate HuggingFaceTB/SmolLM2-135M-Instruct "Who wrote it?" --prompt-file book.txt --plan plan.json`
    """
    options.check()
    if prefill not in ("exact", "streaming"):
        raise InputError(f"--prefill is {prefill!r}, expected exact or streaming")
    text = prompt if prompt is not None else "" if sys.stdin.isatty() else sys.stdin.read()

    import torch
    from transformers import TextStreamer

    from kvcompress.core.artifacts import read_text
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.methods import HeadAwareCompressor
    from kvcompress.models import distributed
    from kvcompress.models.load import input_device
    from kvcompress.models.tensor_parallel import sum_over_shards

    text = (read_text(prompt_file) + "\n" if prompt_file else "") + text
    if not text.strip():
        raise InputError("there is no prompt: give PROMPT, --prompt-file or standard input")
    kept = RetentionPlan.load(plan) if plan else None
    loaded, tokenizer, record = options.open()
    compressor = (
        HeadAwareCompressor.from_plan(kept) if kept else HeadAwareCompressor.from_model_config(loaded.config, "full")
    )
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(input_device(loaded))
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = (
        None if as_json or distributed.rank() else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    length, start = inputs.input_ids.shape[1], time.perf_counter()
    if kept and plan and not distributed.rank():
        warn_of(kept, plan, record, length)
    # The last token is not read again.
    if length + max_new_tokens - 1 > record.max_context and knows_no_more_positions(loaded):
        raise InputError(
            f"the prompt has {length} tokens and up to {max_new_tokens} follow, but {record.id} knows {record.max_context} "
            "positions and no further ones"
        )
    if length + max_new_tokens > record.max_context and not distributed.rank():
        sys.stderr.write(
            f"warning: the prompt has {length} tokens and up to {max_new_tokens} follow, but the context of {record.id} ends "
            f"at {record.max_context}; beyond it answers are seldom of use\n"
        )
    with compressor.attached(loaded):
        cache = compressor.new_cache(loaded.config, cast(Literal["exact", "streaming"], prefill))
        ids = loaded.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, streamer=streamer, **sampling
        )
    held = sum_over_shards(torch.tensor([cache.nbytes, cache.peak_nbytes]), loaded.config).tolist()
    if not distributed.leave():
        return
    new = ids[0, length:]
    if as_json:
        answer = tokenizer.decode(new, skip_special_tokens=True)
        figures = {"seen": cache.seen, "bytes": int(held[0]), "peak_bytes": int(held[1])}
        spent = {"prompt_tokens": length, "new_tokens": len(new), "seconds": round(time.perf_counter() - start, 3)}
        print_json({"text": answer, **spent, "cache": figures})
    else:
        sys.stderr.write(f"{cache}\n")
