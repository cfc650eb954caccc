"""A shard of a split model: its own heads, and errors before any process computes.

Results of several shards: tests/models/test_tensor_parallel.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, Phi3Config

from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.cli.main import app
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor
from kvcompress.models import distributed
from kvcompress.models.attention_interface import use_attention
from kvcompress.models.load import load_folder
from kvcompress.models.params import LocalModel, ModelParams
from kvcompress.models.tensor_parallel import HeadShard, require_as_split, require_split, shard_of, share
from tests.models.shards_program import CONFIGS, save_wide
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide("llama", tmp_path_factory.mktemp("parts") / "llama")


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 1, "tp_plan is 'auto', which needs several processes"),
        ({"device_map": "auto"}, 2, "and model.device_map is 'auto': expected one of the two"),
        ({"device": "cpu"}, 2, "but model.device is 'cpu'"),
        ({}, 3, "llama has 4 KV heads a layer, which 3 processes cannot share equally"),
    ],
)
def test_settings_that_do_not_go_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], processes: int, message: str
) -> None:
    joined(monkeypatch, processes)
    params = ModelParams(source="local", local=LocalModel(path="-"), tp_plan="auto", **settings)
    with pytest.raises(InputError, match=message):
        load_folder(folder, params)


def test_flags_that_do_not_go_together(folder: Path) -> None:
    for flag, message in (("all", "--tp-plan is 'all', expected auto"), ("auto", "needs several processes")):
        with pytest.raises(InputError, match=message):
            app(["generate", str(folder), "What?", "--tp-plan", flag], standalone_mode=False)


def test_commands_of_several_processes_need_a_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("generate", "benchmark"):
        with pytest.raises(InputError, match="torchrun started several: start it without torchrun"):
            app([name, str(folder), *(["What?"] if name == "generate" else [])], standalone_mode=False)


def joined(monkeypatch: pytest.MonkeyPatch, processes: int, one_model: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if processes > 1:
        monkeypatch.setattr(
            distributed, "_joined", distributed.Joined(1, processes, None, torch.device("cpu"), one_model)
        )


def test_a_gpu_for_every_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    params = ModelParams(source="local", local=LocalModel(path="-"), tp_plan="auto")
    with pytest.raises(InputError, match="needs a GPU for each of the 2 processes here, but there are 1"):
        load_folder(folder, params)


def test_plans_that_leave_heads_whole() -> None:
    with pytest.raises(UnsupportedModelError, match="plan to split phi3 leaves its heads whole in every process"):
        require_split(Phi3Config(), 2)
    with pytest.raises(UnsupportedModelError, match="plan to split gpt2 does not exist"):
        require_split(GPT2Config(), 2)
    require_split(CONFIGS["gpt_neox"](), 2)
    mixed = CONFIGS["llama"]()
    mixed.base_model_tp_plan = {"layers.0.k_proj": "colwise", "layers.1.k_proj": "colwise_gather_output"}
    with pytest.raises(UnsupportedModelError, match="plan to split llama leaves its heads whole"):
        require_split(mixed, 2)


def test_processes_that_do_not_go_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 4)
    with pytest.raises(InputError, match="the model is in 2 tensor-parallel parts, but the run has 4 processes"):
        share(SimpleNamespace(tp_size=2))
    joined(monkeypatch, 3)
    with pytest.raises(InputError, match="llama has 4 KV heads a layer, which 3 processes cannot share equally"):
        share(SimpleNamespace(tp_size=3, config=CONFIGS["llama"]()))
    assert not distributed.one_model()


def test_a_model_that_is_not_as_it_was_split(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the model is in 1 tensor-parallel parts, but the run has 1 processes"):
        share(tiny_model("llama"))
    model = tiny_model("llama")
    require_as_split(model, 1)
    with pytest.raises(UnsupportedModelError, match="layer 0 has 2 of its 2 KV heads in each of 2 processes"):
        require_as_split(model, 2)
    model.config.vocab_size = 128
    with pytest.raises(UnsupportedModelError, match="gives 256 logits for 128 tokens"):
        require_as_split(model, 1)
    model.lm_head = torch.nn.Linear(31, 256)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM, as transformers splits it, does not run: mat1"):
        require_as_split(model, 1)


def test_processes_of_one_model_share_no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, 2, one_model=True)
    assert distributed.mine([3.0, 1.0, 2.0]) == [0, 1, 2]
    assert distributed.summed({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert [one.item() for one in distributed.in_order({1: torch.tensor(1.0), 0: torch.tensor(0.0)}, 2)] == [0, 1]


def test_heads_of_a_part() -> None:
    assert [list(range(8))[HeadShard(i, 4).own(8)] for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_a_part_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(UnsupportedModelError, match="llama model is one of 2 tensor-parallel parts"):
        use_attention(model, "kvcompress_observe")
    joined(monkeypatch, 2, one_model=True)
    assert shard_of(model.config) == HeadShard(1, 2)
    with pytest.raises(UnsupportedModelError, match="draws for all heads"):
        FixSizeL2Compressor(8, strategy="random").new_cache(model.config)
    compressor = HeadAwareCompressor.from_model_config(model.config)
    dense = tiny_model("llama")(torch.arange(9)[None], use_cache=True).past_key_values
    with pytest.raises(InputError, match="only some of the model's heads: pass config=model.config"):
        compressor.compress(dense)
    with pytest.raises(UnsupportedModelError, match="split among processes cannot be captured"):
        GraphedDecoder(model, compressor.new_cache(model.config), 4)
