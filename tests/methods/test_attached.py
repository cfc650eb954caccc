"""`attached` lends a model another attention and gives its own back, whatever happens."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvcompress
from kvcompress.cache.dispatch import attached
from kvcompress.core.retention import FULL
from tests.cache.cache_tools import compressor_for, feed, model_of, tokens
from tests.reference.oracle import judged


def attention_of(model):
    return model.config._attn_implementation


def test_the_models_own_attention_comes_back():
    for own in ("sdpa", "eager"):
        model = model_of("llama")
        model.set_attn_implementation(own)
        try:
            with attached(model):
                assert attention_of(model) == "kvcompress"
            assert attention_of(model) == own
            with pytest.raises(ZeroDivisionError), attached(model):
                _ = 1 / 0
            assert attention_of(model) == own
        finally:
            model.set_attn_implementation("sdpa")


def test_it_is_re_entrant():
    model = model_of("llama")
    with attached(model):
        with compressor_for(model, "mixed").attached(model):
            assert attention_of(model) == "kvcompress"
        assert attention_of(model) == "kvcompress"
        with judged(model, [[FULL] * 3] * 2):
            assert attention_of(model) == "kvcompress_oracle"
        assert attention_of(model) == "kvcompress"
    assert attention_of(model) == "sdpa"


def test_two_models_at_once():
    one, other = model_of("llama"), model_of("gpt_neox")
    with compressor_for(one, "mixed").attached(one), compressor_for(other, "mixed").attached(other):
        for model in (one, other):
            feed(model, compressor_for(model, "mixed").new_cache(model.config), tokens(1, 20), [12, 1])
        assert attention_of(one) == attention_of(other) == "kvcompress"
    assert attention_of(one) == attention_of(other) == "sdpa"


def test_names_of_methods_are_functions_whichever_import_comes_first():
    code = """
import kvcompress.methods.streaming_llm
import kvcompress.methods
import kvcompress.methods.head_aware_compress
from kvcompress.methods import HeadAwareCompressor, HeadCompressionConfig
from kvcompress.methods import head_aware_compress, streaming_llm, l2_compress
assert all(callable(f) for f in (head_aware_compress, streaming_llm, l2_compress))
assert kvcompress.methods.fix_size_l2.__name__ == "fix_size_l2"
assert set(dir(kvcompress.methods)) >= {"recent_only", "RecentOnlyCompressor", "Compressor"}
"""
    source_root = Path(kvcompress.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source_root)
