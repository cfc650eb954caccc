"""Retrieval tasks: texts with facts in them, and questions that ask for the facts.

Three tasks: a passkey in filler text (depth x length), a needle in real prose, a lookup among key-value lines. Each
case is a context, a question that names the fact, and the answer. Calibration and evaluation have different templates
and filler. Both draw subjects and word values from the same lists.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from kvcompress.core.errors import InputError
from kvcompress.texts.corpora import leading_tokens

Task = Literal["passkey", "needle", "lookup"]
Use = Literal["calibration", "evaluation"]
TASKS: tuple[Task, ...] = get_args(Task)

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
# (filler, fact, question) of a passkey; those of evaluation are the published ones.
PASSKEY: dict[Use, tuple[str, str, str]] = {
    "evaluation": (
        FILLER,
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
    ),
    "calibration": (
        "Snow is white. Night is dark. Leaves fall in the yard. Who comes by? It is only the wind. ",
        "Her final reply was {key}. Note it down. {key} was her final reply.",
        "What was her final reply? Her final reply was",
    ),
}
LOOKUP: dict[Use, str] = {"evaluation": "{name}: {value}", "calibration": "{name} = {value}"}
WORDS = """
apple river stone garden silver window engine forest candle market bridge winter copper meadow harbor lantern
marble pepper ribbon saddle timber velvet walnut anchor basket cotton feather ginger hammer jacket kettle ladder
""".split()  # noqa: SIM905
PLACES = ("house", "club", "room", "team", "school", "shop", "office", "station")
# (fact, question) of a needle; no template serves both uses.
TEMPLATES: dict[Use, tuple[tuple[str, str], ...]] = {
    "calibration": (
        ("The access code of {who} is {value}.", "The access code of {who} is"),
        ("Remember that {who} keeps its records under the label {value}.", "{who} keeps its records under the label"),
        ("The phone extension of {who} is {value}.", "The phone extension of {who} is"),
    ),
    "evaluation": (
        ("The secret number of {who} is {value}.", "The secret number of {who} is"),
        ("The password for {who} was set to {value}.", "The password for {who} was set to"),
        ("The favorite thing of {who} is the {value}.", "The favorite thing of {who} is the"),
        ("Visitors of {who} must ask for {value}.", "Visitors of {who} must ask for"),
        ("The parcel of {who} lies on the shelf {value}.", "The parcel of {who} lies on the shelf"),
        ("The ferry of {who} leaves from the pier {value}.", "The ferry of {who} leaves from the pier"),
        ("The portrait of {who} hangs above the desk {value}.", "The portrait of {who} hangs above the desk"),
        ("The barrels of {who} were stored in cellar {value}.", "The barrels of {who} were stored in cellar"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One fact to find; token ids are plain lists.

    depth: share of the context that precedes the fact.
    kind: question template of a needle [default: empty for other tasks].
    """

    task: Task
    context: list[int]
    question: list[int]
    answer: list[int]
    depth: float
    kind: str = ""

    @property
    def length(self) -> int:
        return len(self.context)


class CaseMaker:
    """Build cases of exact context length with one tokenizer. A seed always gives the same cases."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, use: Use = "evaluation") -> None:
        self.tokenizer, self.use = tokenizer, use
        self.random = random.Random(f"{seed} {use}")

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def number(self) -> str:
        return str(self.random.randint(10000, 99999))

    def word(self) -> str:
        return self.random.choice(WORDS)

    def assemble(
        self,
        task: Task,
        body: list[int],
        fact: str,
        question: str,
        answer: str,
        length: int,
        depth: float,
        kind: str = "",
    ) -> Case:
        """Insert the fact into the body so that the whole context has `length` tokens."""
        start, inserted = leading_tokens(self.tokenizer), self.encode(f" {fact} ")
        room = length - len(start) - len(inserted)
        if room < 1 or len(body) < room:
            raise InputError(f"a {task} context of {length} tokens cannot be built from {len(body)} tokens of text")
        place = round(depth * room)
        context = start + body[:place] + inserted + body[place:room]
        return Case(task, context, self.encode(f"\n{question}"), self.encode(f" {answer}"), depth, kind)

    def passkey(self, length: int, depth: float) -> Case:
        """Hide five digits in filler text (Mohtashami & Jaggi 2023, arXiv 2305.16300)."""
        key = self.number()
        text, fact, question = PASSKEY[self.use]
        filler = self.encode(text)
        body = filler * (length // len(filler) + 1)
        return self.assemble("passkey", body, fact.format(key=key), question, key, length, depth)

    def needle(self, prose: list[int], length: int, depth: float) -> Case:
        """Hide an unrelated sentence in real prose; its value is a number or a word."""
        who = f"{self.random.choice(WORDS)} {self.random.choice(PLACES)}"
        fact, kind, value = self.statement(who)
        if len(prose) < length:
            raise InputError(f"a needle context of {length} tokens needs as much prose, found {len(prose)} tokens")
        start = self.random.randrange(len(prose) - length + 1)
        body, question = prose[start : start + length], kind.format(who=who)
        return self.assemble("needle", body, fact, question, value, length, depth, kind)

    def statement(self, who: str) -> tuple[str, str, str]:
        """Return (fact, question template, value) about the subject `who`, from a template of this use."""
        value = self.number() if self.random.random() < 0.5 else self.word()
        fact, kind = self.random.choice(TEMPLATES[self.use])
        return fact.format(who=who, value=value), kind, value

    def needles(
        self, prose: list[int], length: int, count: int, far: int = 0
    ) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Hide `count` needles in one context of about `length` tokens, one in each of as many equal parts.

        None begins in the last `far` tokens of prose, if the prose is longer. Returns (context, [(question, answer)])
        as token ids. Raises `InputError` if the prose is too short.
        """
        subjects = self.random.sample([f"{word} {place}" for word in WORDS for place in PLACES], count)
        statements = [self.statement(who) for who in subjects]
        facts = [self.encode(f" {fact} ") for fact, _, _ in statements]
        context, room = leading_tokens(self.tokenizer), length - sum(map(len, facts))
        if room < count or len(prose) < room:
            raise InputError(
                f"a context of {length} tokens cannot be built from {count} facts and {len(prose)} tokens of prose"
            )
        start = self.random.randrange(len(prose) - room + 1)
        last, reach = 0, room - far if room > far else room
        for i, fact in enumerate(facts):
            place = int((i + self.random.random()) / count * reach)
            context += prose[start + last : start + place] + fact
            last = place
        asked = [
            (self.encode(f"\n{kind.format(who=who)}"), self.encode(f" {value}"))
            for who, (_, kind, value) in zip(subjects, statements, strict=True)
        ]
        return context + prose[start + last : start + room], asked

    def lookup(self, length: int, depth: float) -> Case:
        """Hide one line at `depth` among many of the form `key: value`, all keys different."""
        names, line = [f"{first} {second}" for first in WORDS for second in PLACES], LOOKUP[self.use]
        self.random.shuffle(names)
        lines = [
            self.encode("\n" + line.format(name=name, value=self.random.randint(1000, 9999))) for name in names[1:]
        ]
        body: list[int] = []
        while len(body) < length:
            body += lines[len(body) % len(lines)]
        value = str(self.random.randint(1000, 9999))
        fact, question = line.format(name=names[0], value=value), line.format(name=names[0], value="").rstrip()
        return self.assemble("lookup", body, f"\n{fact}", question, value, length, depth)


def make_cases(
    tokenizer: PreTrainedTokenizerBase,
    prose: Mapping[str, str],
    lengths: Sequence[int],
    depths: int,
    per_depth: int,
    seed: int = 0,
    use: Use = "evaluation",
    tasks: Collection[Task] = TASKS,
) -> list[Case]:
    """Make the cases of `tasks` for every length at `depths` evenly spread depths, `per_depth` of each.

    A case does not depend on the other tasks that are asked for.
    """
    maker = CaseMaker(tokenizer, seed, use)
    texts = [maker.encode(text) for text in prose.values()]
    cases = []
    for length, i, repeat in product(lengths, range(depths), range(per_depth)):
        depth = (i + 0.5) / depths
        cases.append(maker.passkey(length, depth))
        cases.append(maker.needle(texts[(i + repeat) % len(texts)], length, depth))
        cases.append(maker.lookup(length, depth))
    return [case for case in cases if case.task in tasks]
