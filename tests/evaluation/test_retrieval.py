"""Retrieval cases are what they say, and "answered" is greedy decoding."""

from difflib import SequenceMatcher
from typing import get_args

import pytest
import torch

from kvcompress.core.errors import InputError
from kvcompress.evaluation.params import ScoringParams, Task
from kvcompress.evaluation.retrieval import answered, retrieve
from kvcompress.methods import HeadAwareCompressor, StreamingLLMCompressor
from kvcompress.sensitivity.fact_price import FILLERS, TWICE
from kvcompress.texts.retrieval_tasks import LOOKUP, PASSKEY, TASKS, TEMPLATES, Case, CaseMaker, Use, make_cases
from tests.tiny import VOCABULARY, prose, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_parameters_know_every_task() -> None:
    assert tuple(get_args(Task)) == tuple(ScoringParams().retrieval_tasks) == TASKS


def test_cases_have_their_length_and_hold_their_fact() -> None:
    cases = make_cases(TOKENIZER, {"a": prose(400, 1), "b": prose(400, 2)}, [200, 330], depths=3, per_depth=2)
    assert len(cases) == 3 * 2 * 3 * 2
    for case in cases:
        context, answer = TOKENIZER.decode(case.context), TOKENIZER.decode(case.answer)
        assert case.length in (200, 330)
        assert answer in context
        place = context.index(answer) / len(context)
        assert abs(place - case.depth) < 0.45
        asked = TOKENIZER.decode(case.question).strip().split("? ")[-1]
        assert asked.removesuffix(":").split()[-1] in context
    assert cases == make_cases(TOKENIZER, {"a": prose(400, 1), "b": prose(400, 2)}, [200, 330], 3, 2)
    assert cases != make_cases(TOKENIZER, {"a": prose(400, 1), "b": prose(400, 2)}, [200, 330], 3, 2, seed=1)


def test_templates_that_calibrate_never_judge() -> None:
    uses: dict[Use, list[str]] = {"calibration": [], "evaluation": []}
    for use, found in uses.items():
        found += [fact for fact, _ in TEMPLATES[use]]
        found += [PASSKEY[use][0], PASSKEY[use][1], LOOKUP[use]]
    uses["calibration"] += [*(fact for fact, _ in TWICE), *FILLERS]
    assert len(set(uses["calibration"]) | set(uses["evaluation"])) == sum(map(len, uses.values()))
    for one in uses["calibration"]:
        for other in uses["evaluation"]:
            # The nearest have "number of {who} is {value}." in common.
            assert SequenceMatcher(None, one.split(), other.split()).find_longest_match().size < 6, (one, other)


def test_too_little_text_is_named() -> None:
    maker = CaseMaker(TOKENIZER, 0)
    with pytest.raises(InputError, match="a needle context of 500 tokens needs as much prose, found 30"):
        maker.needle([1] * 30, 500, 0.5)
    with pytest.raises(InputError, match="a passkey context of 20 tokens cannot be built"):
        maker.passkey(20, 0.5)


def random_case(seed: int, answer: list[int]) -> Case:
    ids = torch.randint(1, VOCABULARY, (70,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Case("passkey", ids[:60], ids[60:], answer, 0.5)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_answered_is_greedy_decoding(prefill: str) -> None:
    """The model's own greedy continuation counts as right; one wrong token in it as wrong."""
    model = tiny_model("llama")
    contenders = {
        "full": HeadAwareCompressor.from_model_config(model.config, "full"),
        "short": StreamingLLMCompressor(2, 10),
    }
    for seed in range(4):
        question = random_case(seed, [])
        for name, compressor in contenders.items():
            with compressor.attached(model), torch.inference_mode():
                cache = compressor.new_cache(model.config, prefill=prefill)
                model(torch.tensor([question.context]), past_key_values=cache)
                ids = torch.tensor([question.context + question.question])
                out = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=None)
            answer = out[0, ids.shape[1] :].tolist()
            wrong = [*answer[:-1], (answer[-1] + 1) % VOCABULARY]
            cases = [random_case(seed, answer), random_case(seed, wrong)]
            found = retrieve(model, cases, {name: compressor}, prefill, progress=False)  # type: ignore[arg-type]
            assert found[name] == [True, False]


def test_exact_prefill_reads_a_context_once_and_without_the_question() -> None:
    model, seen = tiny_model("llama"), []
    contenders = {"a": StreamingLLMCompressor(2, 10), "b": StreamingLLMCompressor(2, 20)}
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[1], kwargs["past_key_values"].get_seq_length())),
        with_kwargs=True,
    )
    retrieve(model, [random_case(0, [1, 2])], contenders, progress=False)
    hook.remove()
    assert seen == [(60, 0), (12, 60), (12, 60)]


def test_answered_looks_at_the_right_places() -> None:
    logits = torch.zeros(5, 10)  # two tokens of question, three of answer
    for place, token in ((1, 4), (2, 5), (3, 6)):
        logits[place, token] = 1
    assert answered(logits, Case("passkey", [], [0, 0], [4, 5, 6], 0))
    assert not answered(logits, Case("passkey", [], [0, 0], [4, 5, 7], 0))
