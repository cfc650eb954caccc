"""Selection by score, and refused inputs."""

from dataclasses import replace

import pytest
import torch

from kvcompress.core.errors import InputError
from kvcompress.scores.registry import make_score
from kvcompress.scores.topk import best
from tests.scores.cases import prompt, with_stays


def test_the_best_are_chosen_in_order() -> None:
    scores = torch.tensor([[[0.1, 5, 3, 4, -2], [9, 8, 7, 6, 5]]])
    assert best(scores, 2).tolist() == [[[1, 3], [0, 1]]]
    assert best(scores, 0).shape == (1, 2, 0)
    assert best(scores, 5).tolist() == [[[0, 1, 2, 3, 4]] * 2]
    exclude = torch.tensor([[[True, False, False, False, True]]])
    assert best(scores, 2, exclude).tolist() == [[[1, 3], [1, 2]]]


def test_ties_go_to_the_lower_slot() -> None:
    scores = torch.zeros(1, 1, 5000)
    assert best(scores, 300).tolist() == [[list(range(300))]]
    scores[..., 4000] = 1
    scores[..., 10:] += 1
    assert best(scores, 3).tolist() == [[[10, 11, 4000]]]


def test_what_is_no_number_comes_last_and_what_is_excluded_never() -> None:
    scores = torch.tensor([[[float("nan"), -torch.inf, 1.0, torch.inf, 2.0]]])
    assert best(scores, 3).tolist() == [[[2, 3, 4]]]
    exclude = torch.tensor([[[False, False, False, True, False]]])
    assert best(scores, 3, exclude).tolist() == [[[0, 2, 4]]]
    assert best(scores, 4, exclude).tolist() == [[[0, 1, 2, 4]]]
    for count in (5, -1):
        with pytest.raises(InputError, match="expected 0 to 4"):
            best(scores, count, exclude)


def test_keys_that_stay_are_the_first_choice() -> None:
    inputs = with_stays(prompt())
    assert inputs.stays is not None
    scores = make_score("key_norm")(inputs)
    chosen = best(scores, 10 + 5)
    assert torch.zeros_like(scores).scatter_(-1, chosen, 1)[inputs.stays.expand_as(scores)].all()
    others = best(scores, 5, inputs.stays)
    assert torch.equal(torch.cat((others, inputs.stays[0, 0].nonzero()[:, 0].expand(2, 2, -1)), -1).sort(-1)[0], chosen)


def test_shapes_that_do_not_fit_are_named() -> None:
    inputs = prompt()
    assert inputs.queries is not None
    for field, tensor in (
        ("values", inputs.values[:, :, 1:]),
        ("positions", inputs.positions[0]),
        ("stays", torch.zeros(3, 1, 40, dtype=torch.bool)),
        ("query_positions", torch.arange(39)[None]),
        ("query_positions", None),
        ("queries", inputs.queries[:, :5]),
    ):
        with pytest.raises(InputError, match="query_positions" if field == "queries" else field):
            replace(inputs, **{field: tensor})


def test_unknown_names_and_parameters_are_refused() -> None:
    for name, parameters, message in (
        ("h2o", {}, "unknown score 'h2o', expected one of key_norm"),
        ("key_norm", {"window": 3}, "score key_norm: .*window"),
        ("snapkv", {"window": 0}, "window is 0"),
        ("snapkv", {"kernel": 4}, "kernel is 4, expected an odd"),
        ("snapkv", {"pooling": "sum"}, "pooling is 'sum'"),
        ("leverage", {"sketch": 2.5}, "sketch is 2.5"),
        ("leverage", {"ridge": 0.0}, "ridge is 0.0"),
        ("expected_attention", {"future": 0}, "future is 0"),
    ):
        with pytest.raises(InputError, match=message):
            make_score(name, **parameters)
