"""Facts to price heads on: half of the contexts are real prose, half are a few sentences over and over.

Heads that find a fact in prose are not all that find one in a monotonous text, where every sentence but one has been
read before. Nothing here is said in the words of the cases that evaluate.
"""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from kvcompress.facts import CaseMaker
from kvcompress.params.sensitivity import SensitivityParams

MONOTONY = "Rain falls on the hills. The train leaves at noon. A door is closed. People walk home. So it goes on. "

Asked = list[tuple[list[int], list[int]]]  # (question, answer), token ids


class RepeatedFacts(CaseMaker):
    """Says every fact twice, and always of a number."""

    def statement(self, who: str) -> tuple[str, str, str]:
        value = str(self.random.randint(10000, 99999))
        fact = f"The access code of {who} is {value}. Keep it in mind: {value} is the access code of {who}."
        return fact, f"Which code does {who} have? The access code of {who} is", value


def calibration_facts(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int, params: SensitivityParams
) -> list[tuple[list[int], Asked]]:
    """`params.fact_contexts` contexts of about `length` tokens, prose and monotony in turns, with their questions.

    Raises `InputError` where a text is too short or a context cannot hold its facts.
    """
    said = CaseMaker(tokenizer, params.seed, "calibration"), RepeatedFacts(tokenizer, params.seed, "calibration")
    prose = [said[0].encode(text) for text in texts.values()]
    sentences = said[1].encode(MONOTONY)
    monotony = sentences * (length // len(sentences) + 1)
    return [
        said[i % 2].many(monotony if i % 2 else prose[i // 2 % len(prose)], length, params.facts_per_context)
        for i in range(params.fact_contexts)
    ]
