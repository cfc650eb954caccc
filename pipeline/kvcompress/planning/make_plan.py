"""Retention plan from a model and texts in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.core.head_classes import load_classifications
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
    """Price the model's heads on `texts` and divide `budget` among them.

    Parameters
    ----------
    budget: a share (`0.25`, `"25%"`), `"512 tokens"` for each head, or bytes (`"40 MB"`).
    context_length: tokens at which the budget is counted [default: that of the priced documents].
    balance: value of answering every far question, nats a token of text [default: that of `BudgetParams`].
    classifications: file of head classes, for the policies of the class table.
    sensitivity: prices from `measure_sensitivity`, to make several plans from one measurement [default: measure].
    early: factor by which `select` favours the first third of the layers; 1 for none [default: that of `BudgetParams`].

    Raises `InputError` for texts that are too short or an invalid budget.
    """
    amount = Budget.parse(budget)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Mapping):
        texts = {f"text {i}": text for i, text in enumerate(texts)}
    defaults = BudgetParams()
    found = sensitivity or measure_sensitivity(model, tokenizer, texts, params)
    planner = Planner(
        found,
        str(getattr(model, "name_or_path", "")) or type(model).__name__,
        Architecture.of_config(model.config).head_dim,
        model.dtype.itemsize,
        context_length or found.context,
        defaults.balance if balance is None else balance,
        None if classifications is None else load_classifications(classifications),
        early=defaults.early if early is None else early,
    )
    return planner.plan(policy, amount)
