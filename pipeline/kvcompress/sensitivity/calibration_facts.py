"""Facts to price heads on: half of the contexts are real prose, half are a few sentences over and over.

Heads that find a fact in prose are not all that find one in a monotonous text, where every sentence but one has been
read before; and heads that find one wording are not all that find another. So wordings and fillers take turns. Some
wordings do not let one guess that the answer is a number: that it is one must be found as well, and other heads find it.
The sentences are others than those of the cases that evaluate; that a number can hide in monotony is what both have in
common.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.retrieval_tasks import TEMPLATES, CaseMaker

MONOTONY = (
    "Rain falls on the hills. The train leaves at noon. A door is closed. People walk home. So it goes on. ",
    "One two three four. The clock ticks on the wall. A dog sleeps. Water runs down the hill. ",
    "The sea is wide. Ships come and go. Nobody counts them. The wind blows again. Stars come out at night. ",
)
# What monotonous text says twice of a number, and how it is asked for; the last three do not say that it is a number.
REPEATED = (
    (
        "The access code of {who} is {value}. Keep it in mind: {value} is the access code of {who}.",
        "Which code does {who} have? The access code of {who} is",
    ),
    (
        "The magic number of {who} is {value}. Do not forget it. {value} is the magic number of {who}.",
        "What is the magic number of {who}? The magic number of {who} is",
    ),
    (
        "The number of the safe of {who} is {value}. Memorize it. {value} opens the safe of {who}.",
        "What is the number of the safe of {who}? The number of the safe of {who} is",
    ),
    (
        "The watchword of {who} is {value}. Keep it ready: {value} is the watchword of {who}.",
        "Which watchword does {who} have? The watchword of {who} is",
    ),
    (
        "The secret of {who} is {value}. Tell nobody. {value} is the secret of {who}.",
        "What is the secret of {who}? The secret of {who} is",
    ),
    (
        "The label of {who} is {value}. Learn it by heart. {value} is the label of {who}.",
        "What is the label of {who}? The label of {who} is",
    ),
)

Asked = list[tuple[list[int], list[int]]]  # (question, answer), token ids


class CalibrationFacts(CaseMaker):
    """Says facts in the calibration wording number `turn`, where `repeated` twice and always of a number."""

    repeated, turn = False, 0

    def statement(self, who: str) -> tuple[str, str, str]:
        number = self.repeated or self.random.random() < 0.5
        value = self.number() if number else self.word()
        wordings: Sequence[tuple[str, str]] = REPEATED if self.repeated else TEMPLATES["calibration"]
        fact, question = wordings[self.turn % len(wordings)]
        self.turn += 1
        return fact.format(who=who, value=value), question, value


def calibration_facts(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int, params: SensitivityParams
) -> list[tuple[list[int], Asked]]:
    """`params.fact_contexts` contexts of about `length` tokens, prose and monotony in turns, with their questions.

    Raises `InputError` where a text is too short or a context cannot hold its facts.
    """
    maker = CalibrationFacts(tokenizer, params.seed, "calibration")
    prose = [maker.encode(text) for text in texts.values()]
    found = []
    for i in range(params.fact_contexts):
        turn = i // 2
        maker.repeated, maker.turn = bool(i % 2), turn
        body = prose[turn % len(prose)]
        if maker.repeated:  # in the second round of wordings each meets another filler
            sentences = maker.encode(MONOTONY[(turn + turn // len(REPEATED)) % len(MONOTONY)])
            body = sentences * (length // len(sentences) + 1)
        found.append(maker.many(body, length, params.facts_per_context, params.far))
    return found
