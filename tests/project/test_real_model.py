"""On the model that `make repro` prepares: one masked pass of the oracle gives the real cache's losses, token by token."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress.core.artifacts import read_json
from kvcompress.core.plan import RetentionPlan
from kvcompress.methods import HeadAwareCompressor
from kvcompress.texts.corpora import documents, load_texts
from tests.project.project import ROOT
from tests.reference.oracle import judged

DATA = ROOT / "data"
TOKENS, PROMPT = 1024, 960  # token by token after the prompt
needs_model = pytest.mark.skipif(not (DATA / "model.json").is_file(), reason="make repro puts a model into data/model")


def losses(logits: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """Nats of every token but the first, `[token - 1]`."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").numpy()


@needs_model
@torch.inference_mode()
@pytest.mark.parametrize("plan", ["uniform-25", "priced-25", "class_table"])
def test_one_masked_pass_equals_the_real_cache(plan: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(DATA / "model")
    name, text = next(iter(load_texts(DATA / "corpus", "evaluation").items()))
    ids = next(iter(documents(tokenizer, name, text, TOKENS, 1)))[None]
    path = (
        ROOT
        / "reports/devices/cpu-2-cores/plans"
        / read_json(DATA / "model.json")["id"].split("/")[-1]
        / f"{plan}.json"
    )
    kept = RetentionPlan.load(path).layers
    compressor = HeadAwareCompressor.from_plan(path)
    for prefill in ("streaming", "exact"):
        with judged(model, kept, prefill, PROMPT if prefill == "exact" else None):
            expected = losses(model(ids, use_cache=False).logits, ids)
        with compressor.attached(model):
            cache, found = compressor.new_cache(model.config, prefill=prefill), []
            for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
                found.append(model(part, past_key_values=cache).logits)
        np.testing.assert_allclose(losses(torch.cat(found, dim=1), ids), expected, atol=1e-4)
