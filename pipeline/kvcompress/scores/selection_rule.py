"""Rule of strategy `select`: when a KV head selects keys, among which keys, and by which queries.

A head with s sinks, a window of w and k selected keys has s + w + k slots, one for each key. It holds every token
until the slots are full. From then on it selects again every r = min(`every`, w) tokens. Candidates are the k
selected keys and the r oldest keys of the window, whose slots the next r tokens overwrite. The k best candidates
become the selected keys.

Rejected candidates stay in the slots that the next tokens overwrite. A rejected window key keeps its slot, so it
stays visible for as long as the window reaches. A newly rejected key swaps slots with the key that replaced it; the
lowest score is overwritten first. A selection therefore swaps rows and copies none: no key is held twice, no slot is
empty, and a decode step between two selections is that of a head with s + k sinks and a window of w.

At the end of an exact prefill the k best of all keys older than the window are taken, and the same scores decide at
once between these and the r oldest keys of the window. These scores use all queries of the prompt, later ones the
last `observe` queries: a question that comes after the prompt has no influence on the selection from the prompt. Every
row of a batch and every head selects for itself. How a text is cut into passes and how other rows are padded changes
scores by rounding only, which may reorder keys of equal score (pooled neighbours often have equal scores).
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
    """Rule by which all heads of a cache select keys. Raises `InputError` for numbers below 1.

    Parameters
    ----------
    every: tokens between two selections of a head; fewer if its window is shorter.
    observe: last queries that a selection uses while streaming or decoding. A cache keeps them, for scores that need
        queries, in the model's own precision: `[batch, query_head, observe, head_dim]` a layer.
    scores: scores by name, where they differ from the score of that name with default parameters.
    rotation: the model's rotary embedding, for scores that use vectors before rotation; None if unknown.
    """

    every: int = 512
    observe: int = 16
    scores: Mapping[str, Score] = field(default_factory=dict)
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        require_at_least(1, every=self.every, observe=self.observe)

    def score(self, name: str) -> Score:
        """Return the score of that name. Raises `InputError` for an unknown one."""
        return self.scores[name] if name in self.scores else make_score(name)


def kept_query_slots(plan: RetentionPlan, rule: SelectionRule | None = None) -> int:
    """Slots of K and V that take as many bytes as the queries a cache of this plan keeps for selection.

    A layer keeps `observe` queries of every query head if any of its heads has a score that needs queries; a slot is
    two vectors of their size. Positions of keys and attention totals, a few bytes a slot, are not counted.
    """
    rule = rule or SelectionRule()
    asking = sum(any(kept.chosen and rule.score(kept.score).needs_queries for kept in layer) for layer in plan.layers)
    return asking * plan.num_attention_heads * rule.observe // 2


def require_free_of_queries(score: str, rule: SelectionRule) -> None:
    """Raise `InputError` if a score ranks by queries, which a cache filled elsewhere does not have."""
    if rule.score(score).needs_queries:
        raise InputError(
            f"score {score!r} ranks keys by queries, and a cache that is compressed afterwards has none: start with"
            " new_cache, or use key_norm or key_diff"
        )
