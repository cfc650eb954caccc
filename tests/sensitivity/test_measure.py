"""Sensitivity of heads: additive over documents, saved without loss, priced by a rule that can be checked by hand."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kvcompress.core.artifacts import read_tensors, write_tensors
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.fact_price import FILLERS, TWICE, calibration_facts, fact_prices
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SHRINK, SelectOption, Sensitivity
from kvcompress.sensitivity.text_price import text_prices
from kvcompress.texts.corpora import documents_of_all
from kvcompress.texts.retrieval_tasks import FILLER, TEMPLATES, WORDS, CaseMaker
from tests.tiny import prose, tiny_model, tiny_tokenizer

PARAMS = SensitivityParams(
    max_tokens=256, documents_per_text=2, windows=[4, 16, 64, 500], joint_windows=[16], sinks=2, fact_contexts=2,
    facts_per_context=2, far=16, nodes=2,
)  # fmt: skip
TEXTS = {"a": prose(100, 5), "b": prose(100, 6)}


def measured(name: str, texts: dict[str, str] | None = None, params: SensitivityParams = PARAMS) -> Sensitivity:
    return measure_sensitivity(tiny_model(name), tiny_tokenizer(), texts or TEXTS, params, progress=False)


@pytest.mark.parametrize(("name", "kv_heads"), [("gpt_neox", 4), ("llama", 2)])
def test_documents_add_up(name: str, kv_heads: int) -> None:
    both = measured(name)
    apart = [measured(name, {text: TEXTS[text]}) for text in TEXTS]
    assert both.fisher.shape == (3, 2, kv_heads)  # the window of 500 does not fit 256 tokens
    assert both.windows == [4, 16, 64]
    np.testing.assert_allclose(both.fisher, apart[0].fisher + apart[1].fisher, rtol=1e-9)
    np.testing.assert_allclose(both.joint, apart[0].joint + apart[1].joint, rtol=1e-9)
    assert (both.tokens, both.joint_tokens) == (4 * 256, 2 * 256)
    assert sum(one.tokens for one in apart) == both.tokens
    assert both.retrieval.shape == apart[0].retrieval.shape == (4, 2, kv_heads)
    assert both.fisher[0].min() > both.fisher[-1].min() >= 0
    assert np.abs(both.retrieval).max() > 0


def test_every_option_has_its_own_prices() -> None:
    params = PARAMS.model_copy(update={"choice_sizes": [128, 160, 200], "choice_parts": [0.5, 0.3]})
    found, model, tokenizer = measured("llama", params=params), tiny_model("llama"), tiny_tokenizer()
    scores = ("expected_attention", "key_diff", "leverage")
    assert found.choices == [
        SelectOption(score, part, size) for score in scores for part in (0.5, 0.3) for size in (128, 160, 200)
    ]
    rotation, shape = Rotation.of(model.config), (2, 2)
    batch = [tokens for each in documents_of_all(tokenizer, TEXTS, 256, 2).values() for tokens in each]
    questions = calibration_facts(tokenizer, TEXTS, 252, params)
    for i in (0, 4, 11, 17):
        text = [text_prices(model, tokens, [16], 2, shape, 0, [found.choices[i]], rotation)[0][1] for tokens in batch]
        np.testing.assert_allclose(found.chosen[i], sum(text), rtol=1e-6)
        facts = [fact_prices(model, *one, 16, 2, shape, 2, [found.choices[i]], rotation)[:, 1] for one in questions]
        np.testing.assert_allclose(found.lost[:, i], np.concatenate(facts), rtol=1e-5, atol=1e-7)


def test_prices_of_options_have_the_rate_of_their_layer_and_are_shrunk() -> None:
    fisher = np.array([[[10.0, 30], [20, 20]], [[0, 10], [10, 10]]])
    joint = np.array([[[5.0, 5], [10, 40]]])
    windows = made(fisher, joint)
    kinds = [SelectOption("key_diff", 0.5, 4), SelectOption("key_diff", 0.5, 16), SelectOption("key_norm", 0.5, 4)]
    both = replace(windows, choices=kinds, chosen=np.concatenate([fisher, 2 * fisher[:1]]))
    np.testing.assert_allclose(both.option_prices()[:2], windows.prices())
    np.testing.assert_allclose(both.option_prices()[2], 2 * windows.prices()[0])


def test_the_same_texts_give_the_same_prices() -> None:
    one, other = measured("llama"), measured("llama")
    for field in ("fisher", "joint", "retrieval"):
        assert np.array_equal(getattr(one, field), getattr(other, field))


def made(fisher: np.ndarray, joint: np.ndarray) -> Sensitivity:
    facts = np.zeros((1, *fisher.shape[1:]))
    return Sensitivity(
        [4, 16][: len(fisher)],
        2,
        64,
        10,
        5,
        fisher,
        joint,
        facts,
        {"num_attention_heads": 2},
        [],
        facts[:0],
        facts[:, None][:, :0],
    )


def test_prices_are_the_heads_own_times_their_layers_rate_and_shrunk() -> None:
    fisher = np.array([[[10.0, 30], [20, 20]], [[0, 10], [10, 10]]])  # [window, layer, kv_head]
    joint = np.array([[[5.0, 5], [10, 40]]])
    found = made(fisher, joint).prices()
    single, rate = fisher / 10, np.array([2 / 5, 10 / 6])  # joint a token over the heads' own, a layer
    expected = single * rate[:, None]
    expected *= single.sum() / expected.sum()
    mean = expected.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(found, (1 - SHRINK) * expected + SHRINK * mean)


def test_prices_fall_with_the_window_and_do_without_a_joint_price() -> None:
    fisher = np.array([[[1.0, 3]], [[2.0, 1]]])
    found = made(fisher, np.zeros((1, 1, 2))).prices()
    assert (found[0] >= found[1]).all()
    assert found[0, 0, 0] == found[1, 0, 0]  # the shorter window cannot be cheaper


def test_a_file_comes_back_whole_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    found, path = measured("llama"), tmp_path / "head_sensitivity.safetensors"
    found.save(path)
    again = Sensitivity.load(path)
    for name, value in vars(found).items():
        assert np.array_equal(value, getattr(again, name)), name
    tensors, header = read_tensors(path)
    write_tensors(path, {**tensors, "fisher": torch.full_like(tensors["fisher"], torch.nan)}, header)
    with pytest.raises(InputError, match="fisher holds values that are not finite"):
        Sensitivity.load(path)
    write_tensors(path, {**tensors, "joint": tensors["joint"][..., :1]}, header)
    with pytest.raises(InputError, match="joint has the shape"):
        Sensitivity.load(path)
    write_tensors(path, {"fisher": tensors["fisher"]}, header)
    with pytest.raises(InputError, match="does not hold the prices"):
        Sensitivity.load(path)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="context ends at 512"):
        measured("llama", params=PARAMS.model_copy(update={"max_tokens": 1024}))
    with pytest.raises(InputError, match="no window is shorter"):
        measured("llama", params=PARAMS.model_copy(update={"windows": [500]}))
    with pytest.raises(InputError, match="short"):
        measured("llama", {"short": "Too short."})
    with pytest.raises(UnsupportedModelError, match="softcap"):
        measure_sensitivity(tiny_model("gemma2", "eager"), tiny_tokenizer(), TEXTS, PARAMS, progress=False)


def test_a_model_comes_back_as_it_was() -> None:
    model = tiny_model("llama")
    measure_sensitivity(model, tiny_tokenizer(), TEXTS, PARAMS, progress=False)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The tiny tokenizer's own decoder leaves a mark for every space."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", " ")


def subject(question: str) -> str:
    """Who is asked about: two words, of which the first is one of WORDS."""
    words = question.replace("?", "").split()
    return next((" ".join(words[i : i + 2]) for i in range(len(words)) if words[i] in WORDS), "")


def test_facts_are_asked_for_in_prose_and_in_repetitive_text() -> None:
    tokenizer, params = tiny_tokenizer(), PARAMS.model_copy(update={"fact_contexts": 12, "facts_per_context": 1})
    found = calibration_facts(tokenizer, TEXTS, 900, params)

    assert len(found) == 12
    wordings: set[str] = set()
    fillers: set[str] = set()
    every = [question for _, question in (*TWICE, *TEMPLATES["calibration"])]
    for i, (context, asked) in enumerate(found):
        text = read(tokenizer, context)
        fillers |= {filler for filler in FILLERS if filler[:20] in text}
        assert any(filler[:20] in text for filler in FILLERS) == bool(i % 2)
        assert len(context) == 900
        for question, answer in asked:
            value = read(tokenizer, answer).strip()
            assert text.count(value) >= 1 + i % 2
            assert text.index(value) < len(text) - PARAMS.far  # a fact that is not far would carry nothing
            said = read(tokenizer, question).strip()
            wordings |= {one for one in every if said == one.format(who=subject(said))}
    assert fillers == set(FILLERS)
    assert wordings == set(every)


def test_sentences_that_calibrate_are_not_those_that_evaluate() -> None:
    maker = CaseMaker(tiny_tokenizer(), 0)
    cases = [maker.passkey(400, 0.5), maker.lookup(400, 0.5)]
    evaluating = " ".join(read(maker.tokenizer, case.context + case.question) for case in cases)
    evaluating += " ".join(part for pair in TEMPLATES["evaluation"] for part in pair)
    assert "The pass key is" in evaluating
    calibrating = CaseMaker(tiny_tokenizer(), 0, "calibration")
    for case in (calibrating.passkey(400, 0.5), calibrating.lookup(400, 0.5)):
        for line in re.split(r"(?<=[.?])\s|\n", read(maker.tokenizer, case.context + case.question)):
            assert not line.strip() or line.strip() not in evaluating, line
    for said in (*TWICE, *TEMPLATES["calibration"]):
        for sentence in re.split(r"(?<=[.?:]) ", " ".join(said)):
            pattern = re.sub(r"\\{(who|value)\\}", r"[\\w{} ]+", re.escape(sentence.strip(" .?:")))
            if len(sentence.split()) > 2:
                assert not re.search(pattern, evaluating), sentence
    for sentence in "".join(FILLERS).rstrip(" .").split(". "):
        assert sentence not in FILLER
