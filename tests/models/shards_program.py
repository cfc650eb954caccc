"""Program that torchrun starts for tests/models/test_tensor_parallel.py: one model in several processes.

Run: torchrun --nproc-per-node N -m tests.models.shards_program JSON, a list of [stage or "kvcompress", flags] that follow.
`measured` is also what the test's one process computes; results go to NAME.safetensors in this folder, as the first
process has them.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import stages  # noqa: F401 (puts this copy's pipeline first)
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cli import main as program
from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import CollectParams
from kvcompress.core.errors import UnsupportedModelError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.evaluation.perplexity import score_contenders
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor, L2Compressor, StreamingLLMCompressor
from kvcompress.methods.compressor import Compressor
from kvcompress.models import distributed
from kvcompress.models.load import input_device, load_folder
from kvcompress.models.params import LocalModel, ModelParams
from kvcompress.models.tensor_parallel import gather_heads, share
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.retrieval_tasks import make_cases
from tests.reference.oracle import judged
from tests.reference.recorded_selections import recorded_choices
from tests.tiny import COMMON, prose, tiny_tokenizer

WIDE = COMMON | {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 8}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=4),
    "tied": lambda: LlamaConfig(**WIDE, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**WIDE, num_key_value_heads=4),
    "gpt_neox": lambda: GPTNeoXConfig(**(COMMON | {"hidden_size": 64, "num_attention_heads": 4})),
}
REFUSED = {"neox_tied": lambda: GPTNeoXConfig(**COMMON, tie_word_embeddings=True)}
PRICED = SensitivityParams(
    max_tokens=160,
    choice_sizes=[128],
    windows=[16, 48],
    joint_windows=[16],
    fact_contexts=1,
    facts_per_context=2,
    far=16,
    nodes=2,
)
STOPPING = CollectParams(stop_entropy_error=0.0335, stop_every=4)
WINDOWS = RetentionPlan(
    ((Retention(2, 30), FULL, PRUNED, Retention(0, 7)), (FULL, FULL, Retention(2, 30), Retention(4, 12))), 8
)
CHOSEN = RetentionPlan(
    (
        (Retention(2, 9, 6, "snapkv"), FULL, Retention(2, 9, 6, "leverage"), Retention(1, 5, 4, "key_diff")),
        (
            Retention(2, 8, 9, "expected_attention"),
            PRUNED,
            Retention(2, 8, 9, "expected_attention"),
            Retention(0, 6, 5, "accumulated_attention"),
        ),
    ),
    8,
)


def save_wide(name: str, folder: Path) -> Path:
    """A random model of 4 KV heads as a folder; its attention is peaked, so that a wrong key shows."""
    torch.manual_seed(7)
    config = (CONFIGS | REFUSED)[name]()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(20 if any(part in name for part in ("q_proj", "k_proj", "query_key")) else 6)
            else:
                parameter.add_(torch.randn_like(parameter) / 8)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def opened(name: str, **settings: str) -> PreTrainedModel:
    params = ModelParams(source="local", local=LocalModel(path=f"inputs/{name}"), **settings)
    return load_folder(f"inputs/{name}", params)[0]


def compressors() -> dict[str, Compressor]:
    return {
        "full cache": HeadAwareCompressor([[FULL] * 4] * 2, query_heads=False),
        "windows": HeadAwareCompressor(WINDOWS.layers, query_heads=False),
        "chosen": HeadAwareCompressor(
            CHOSEN.layers, query_heads=False, selection_rule=SelectionRule(every=4, observe=5)
        ),
        "l2": L2Compressor(0.5, 32, skip_layers=[0]),
        "fix": FixSizeL2Compressor(24, 0.5, skip_layers=[]),
        "in the cache": StreamingLLMCompressor(2, 20, positions="cache"),
    }


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def positions(cache: RaggedCache, config) -> Tensor:
    """Tokens that every KV head of the model holds, bool `[layer, kv_head, token]`."""
    held = torch.zeros(len(cache.layers), cache.compressed_layers[0].heads, cache.seen)
    for layer, heads in enumerate(cache.compressed_layers):
        for head, places in enumerate(heads.positions()):
            held[layer, head, places] = 1
    return gather_heads(held, 1, config)


def cached(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits, held tokens and generated tokens of caches whose heads differ."""
    found, text = {}, ids(90).to(input_device(model))
    for name, compressor in list(compressors().items())[1:3]:
        for prefill in ("exact", "streaming"):
            with compressor.attached(model), torch.inference_mode():
                cache = compressor.new_cache(model.config, prefill)
                with recorded_choices(cache) as choices:
                    pieces = text.split([50, 9, *[1] * 31], 1)
                    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)
                found[f"{name}.{prefill}.logits"] = logits[0]
                found[f"{name}.{prefill}.held"] = positions(cache, model.config)
                fresh = compressor.new_cache(model.config, prefill)
                prompt = ids(40, 2).to(text.device)
                mask = torch.ones_like(prompt)
                mask[1, :7] = 0  # padded on the left
                found[f"{name}.{prefill}.tokens"] = model.generate(
                    prompt, attention_mask=mask, past_key_values=fresh, max_new_tokens=24, do_sample=False
                )
                fresh = compressor.new_cache(model.config, prefill)
                torch.manual_seed(3)  # alike in all processes
                found[f"{name}.{prefill}.drawn"] = model.generate(
                    prompt, attention_mask=mask, past_key_values=fresh, max_new_tokens=24, do_sample=True
                )
            prompt_length = 50 if prefill == "exact" else None
            with judged(model, compressor.retention, prefill, prompt_length, choices), torch.inference_mode():
                found[f"{name}.{prefill}.judged"] = model(text, use_cache=False).logits[0] - logits[0]
    return found


def measured(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that has to be as in one process."""
    device, tokenizer = input_device(model), tiny_tokenizer()
    documents = [ids(length)[0] for length in (130, 40, 41)]
    sums = collect_attention(model, documents, 64, progress=False)
    found = {f"attention.{name}": tensor for name, tensor in sums.tensors.items()}
    more = [ids(length)[0] for length in range(40, 56)]
    read = collect_attention(model, more, 64, progress=False, stopping=STOPPING).documents
    found["read"] = torch.tensor(read)  # the heads of one process would have been enough earlier
    assert read == 12
    prices = measure_sensitivity(model, tokenizer, {"a": prose(60, 1)}, PRICED, progress=False)
    for name in ("fisher", "joint", "retrieval", "chosen", "lost"):
        found[f"prices.{name}"] = torch.from_numpy(getattr(prices, name))
    found |= cached(model)
    scores = score_contenders(model, {"a": documents[:1]}, compressors(), 32, 16, progress=False)
    cases = make_cases(tokenizer, {"a": prose(80, 1)}, [160], 2, 1)
    answers = retrieve(model, cases, compressors(), progress=False)
    for name, score in scores.items():
        found[f"score.{name}"] = torch.from_numpy(score.nll)
        found[f"bytes.{name}"] = torch.tensor([score.nbytes_end, score.nbytes_mean], dtype=torch.float64)
        found[f"answers.{name}"] = torch.tensor(answers[name])
    bounded = {name: compressors()[name] for name in ("in the cache", "chosen")}
    beyond = {"a": [ids(1025)[0]]}
    scores = score_contenders(model, beyond, bounded, 128, 128, progress=False, references=False)
    found["bytes.beyond"] = torch.tensor([score.nbytes_end for score in scores.values()])
    with compressors()["windows"].attached(model), torch.inference_mode():  # the loop that compresses a dense cache
        past = model(documents[0][None, :60].to(device), use_cache=True).past_key_values
        past = compressors()["windows"].compress(past, config=model.config)
        assert compressors()["windows"].compress(past) is past
        found["compressed"] = model(documents[0][None, 60:].to(device), past_key_values=past).logits[0]
    return found


def keep(name: str, found: dict[str, Tensor]) -> None:
    if distributed.rank() == 0:
        save_file({key: tensor.cpu().contiguous() for key, tensor in found.items()}, f"{name}.safetensors")


def adopted(folder: str) -> PreTrainedModel:
    """A model that transformers split with nobody else involved; unusable until the processes are told."""
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    compressor = compressors()["windows"]
    for use in (lambda: compressor.new_cache(model.config), lambda: collect_attention(model, [ids(40)[0]])):
        with pytest.raises(UnsupportedModelError, match=r"tensor_parallel.share\(model\)"):
            use()
    share(model)
    return model


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "adopt":
        keep("adopted", cached(adopted("inputs/llama")))
        for name in REFUSED:
            with pytest.raises(
                UnsupportedModelError, match=r"as transformers splits it, (does not run|gives \d+ logits)"
            ):
                opened(name, tp_plan="auto")
        return
    distributed.join()
    for name in CONFIGS:
        model = opened(name, tp_plan="auto")
        keep(f"together-{name}", measured(model) if name == "llama" else cached(model))
    distributed.leave = lambda: distributed.rank() == 0
    for name, flags in json.loads(sys.argv[1]):
        sys.argv = [name, *flags]
        try:
            if name == "kvcompress":
                program.run()
            else:
                runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
