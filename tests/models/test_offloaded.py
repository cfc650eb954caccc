"""A model that lies in several places, also on disk: statistics, prices and compressed caches are those of the plain one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvcompress.collect.collect import collect_attention
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, Retention
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.perplexity import score_contenders
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.methods import HeadAwareCompressor, L2Compressor
from kvcompress.models.load import input_device, load_folder
from kvcompress.models.params import LocalModel, ModelParams
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.retrieval_tasks import make_cases
from tests.tiny import prose, save_tiny, tiny_tokenizer

PLAN = RetentionPlan(((FULL, Retention(2, 30)), (Retention(2, 60), Retention(2, 62))), 4)
PARAMS = SensitivityParams(
    max_tokens=128, documents_per_text=1, windows=[16], joint_windows=[16], fact_contexts=1, facts_per_context=1, far=16,
    nodes=1,
)  # fmt: skip
TEXTS = {"a": prose(80, 1)}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
PLACES = {
    "disk": dict.fromkeys(PARTS, "disk"),
    "both": dict.fromkeys(PARTS, "cpu") | {"model.embed_tokens": "disk", "model.layers.1": "disk"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("offloaded") / "model")


def spread(folder: Path, places: dict[str, str]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder.parent / "off").eval()


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("places", PLACES)
def test_everything_is_as_on_one_device(folder: Path, plain: PreTrainedModel, places: str) -> None:
    model = spread(folder, PLACES[places])
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    assert input_device(model) == torch.device("cpu")
    assert environment(model) == environment(plain)
    tokens = torch.randint(256, (130,), generator=torch.Generator().manual_seed(0))
    found, expected = (collect_attention(one, [tokens], 64, progress=False) for one in (model, plain))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor)
    prices, same = (measure_sensitivity(one, tiny_tokenizer(), TEXTS, PARAMS, progress=False) for one in (model, plain))
    for name in ("fisher", "joint", "retrieval"):
        np.testing.assert_allclose(getattr(prices, name), getattr(same, name), rtol=1e-5, atol=1e-7)


def test_compressed_caches_are_as_on_one_device(folder: Path, plain: PreTrainedModel) -> None:
    model = spread(folder, PLACES["both"])
    contenders = {
        "full cache": HeadAwareCompressor.from_plan(
            RetentionPlan(((FULL, FULL), (FULL, FULL)), 4)
        ),
        "plan": HeadAwareCompressor.from_plan(PLAN),
        "l2": L2Compressor(0.5, 32),
    }  # fmt: skip
    documents = {"a": [torch.randint(256, (128,), generator=torch.Generator().manual_seed(1))]}
    cases = make_cases(tiny_tokenizer(), TEXTS, [160], 1, 1)
    scores, same = (score_contenders(one, documents, contenders, 64, progress=False) for one in (model, plain))
    for name in contenders:
        np.testing.assert_allclose(scores[name].nll, same[name].nll, atol=1e-5)
        assert scores[name].nbytes_peak == same[name].nbytes_peak
    assert retrieve(model, cases, contenders, progress=False) == retrieve(plain, cases, contenders, progress=False)
    ids = torch.randint(1, 256, (2, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # padded on the left
    out = []
    for one in (model, plain):
        with contenders["plan"].attached(one):
            cache = contenders["plan"].new_cache(one.config)
            out.append(one.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False))
    assert torch.equal(*out)


def test_a_device_map_by_name(folder: Path, plain: PreTrainedModel) -> None:
    params = ModelParams(source="local", local=LocalModel(path=str(folder)), device_map="auto")
    model, _ = load_folder(folder, params)
    tokens = torch.randint(256, (1, 40))
    logits = model(tokens.to(input_device(model))).logits.cpu()
    torch.testing.assert_close(logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
def test_statistics_of_a_model_split_between_devices(folder: Path, plain: PreTrainedModel, elsewhere: str) -> None:
    if elsewhere == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model = spread(folder, dict.fromkeys(PARTS, "cuda:0") | {"model.layers.0": elsewhere, "lm_head": elsewhere})
    tokens = torch.randint(256, (130,), generator=torch.Generator().manual_seed(0))
    found, expected = (collect_attention(one, [tokens], 64, progress=False) for one in (model, plain))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-3)
    compressor = HeadAwareCompressor.from_plan(PLAN)
    ids = torch.randint(1, 256, (1, 90), generator=torch.Generator().manual_seed(2))
    logits = []
    for one in (model, plain):
        with compressor.attached(one), torch.no_grad():
            cache = compressor.new_cache(one.config, prefill="streaming")
            parts = ids.to(input_device(one)).split([60, *[1] * 30], 1)
            logits.append(torch.cat([one(part, past_key_values=cache).logits.cpu() for part in parts], 1))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
