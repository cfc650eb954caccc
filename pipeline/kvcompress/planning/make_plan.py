"""From a model and some text to a plan, in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.core.plan import RetentionPlan
from kvcompress.models.architecture import Architecture
from kvcompress.planning.budget import Budget
from kvcompress.planning.params import BudgetParams
from kvcompress.planning.policies import Planner
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import Sensitivity


def make_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | Mapping[str, str],
    budget: str | float | Budget = 0.25,
    policy: str = "priced",
    context_length: int | None = None,
    balance: float | None = None,
    classifications: str | Path | None = None,
    sensitivity: Sensitivity | None = None,
    params: SensitivityParams | None = None,
    early: float | None = None,
) -> RetentionPlan:
    """Price the model's heads on `texts` and spend `budget` on them.

    budget: a share (`0.25`, `"25%"`), `"512 tokens"` for each head, or bytes (`"40 MB"`), at a context of `context_length`
    tokens (default: the length of the documents that heads are priced on, `params.max_tokens`). balance: nats a token of
    text that answering every far question is worth. `sensitivity`: what an earlier call measured
    (`measure_sensitivity`), to make several plans from it. early: how much the policy `select` favours the first third of
    the layers beyond their prices, 1 for not at all. Raises `InputError` for texts too short or a wrong budget.
    """
    amount = Budget.parse(budget)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Mapping):
        texts = {f"text {i}": text for i, text in enumerate(texts)}
    settings = params or SensitivityParams()
    spending = BudgetParams()
    found = sensitivity or measure_sensitivity(model, tokenizer, texts, settings)
    planner = Planner(
        found,
        str(getattr(model, "name_or_path", "")) or type(model).__name__,
        Architecture.of_config(model.config).head_dim,
        model.dtype.itemsize,
        context_length or found.context,
        spending.balance if balance is None else balance,
        None if classifications is None else Path(classifications),
        early=spending.early if early is None else early,
    )
    return planner.plan(policy, amount)
