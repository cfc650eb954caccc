"""How a cache chooses keys by content, and the record of what it chose.

This is where the strategy `select` is defined. A head holds s sinks, the last w keys and k chosen ones, each once, in
just s + w + k slots; until as many tokens were seen it holds all. From then on it chooses anew every r = min(`every`, w)
tokens. Candidates are the k chosen keys and the r oldest of the window, which the next r tokens will push out one by one.
The k best of them become the chosen keys. The others stay where the next tokens will overwrite them: a window key in its
own place, so that it is seen for as long as the window reaches, a key that is no longer chosen in the place of one that
now is, the worst in the place that goes first. So a choice moves rows and copies none: nothing is held twice, no slot is
empty, and between two choices a decode step is that of a window of s + k sinks and w keys.

At the end of an exact prefill the k best of all older keys are taken, and the same scores decide at once between these
and the r oldest of the window. Scores rank by all queries of the prompt there, and by the last `observe` afterwards:
of a question that comes after the prompt nothing is known when the prompt's keys are chosen. Each row of a batch and each
head chooses for itself; a choice depends on how a text was cut into passes, and on what other rows are padded to, no more
than scores do: by rounding, which may order keys that score the same (neighbours do whose scores are pooled).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.models.rotary import Rotation
from kvcompress.scores.base import Score, require_at_least
from kvcompress.scores.registry import make_score


@dataclass(frozen=True)
class SelectionRule:
    """every: tokens between two choices of a head, where its window is not shorter.
    observe: last queries that a choice while streaming or decoding goes by. They are kept, for scores that need any, in
        the model's own precision: `[batch, query_head, observe, head_dim]` a layer, which `evidence_nbytes` counts.
    scores: by name, for those that shall not have their default parameters.
    rotation: the model's rotary embedding, for scores that look at vectors before it; None where it is unknown.

    Raises `InputError` for numbers below 1.
    """

    every: int = 512
    observe: int = 16
    scores: Mapping[str, Score] = field(default_factory=dict)
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        require_at_least(1, every=self.every, observe=self.observe)

    def score(self, name: str) -> Score:
        """The score of that name. Raises `InputError` for one that is not known."""
        return self.scores[name] if name in self.scores else make_score(name)


def kept_query_slots(plan: RetentionPlan, choosing: SelectionRule | None = None) -> int:
    """Slots of K and V that take as many bytes as the queries which a cache of this plan keeps to choose keys by.

    Those are, in a layer where any head's score asks for queries, `observe` of every query head; a slot is two vectors of
    their size. Where keys lie and what they received, a few bytes a slot, is not counted.
    """
    rule = choosing or SelectionRule()
    asking = sum(any(kept.chosen and rule.score(kept.score).needs_queries for kept in layer) for layer in plan.layers)
    return asking * plan.num_attention_heads * rule.observe // 2


def require_free_of_queries(score: str, choosing: SelectionRule) -> None:
    """Raise `InputError` where a score ranks by queries, which a cache filled elsewhere does not have."""
    if choosing.score(score).needs_queries:
        raise InputError(
            f"score {score!r} ranks keys by queries, and a cache that is compressed afterwards has none: start with"
            " new_cache, or choose by key_norm or key_diff"
        )
