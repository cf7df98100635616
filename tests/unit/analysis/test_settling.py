"""Stable ranks are those of the folded weights, and have settled where the stated rule says so."""

from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.settling import has_settled, stable_ranks


def test_layers_are_those_that_can_be_factorized_dense_or_not():
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.Linear(70, 90)
    )
    model.append(nn.Embedding(70, 80))
    state, before = torch.get_rng_state(), stable_ranks(model, embeddings=True)
    assert torch.equal(state, torch.get_rng_state())
    assert list(before) == ["0", "2", "3", "4"]
    assert list(stable_ranks(model, exclude=["0"])) == ["2", "3"]
    weight = model[2].weight.detach().transpose(0, 1).flatten(1)
    assert before["2"] == pytest.approx(((weight.norm() / torch.linalg.matrix_norm(weight, 2)) ** 2).item(), rel=1e-5)
    lrc.factorize_(model, lrc.allocate(model, 1.0, method=lrc.UniformRank()))
    assert stable_ranks(model, embeddings=True) == pytest.approx(before, rel=1e-4)


ranks = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0.5, 50), min_size=1), max_size=6)


@given(ranks, st.integers(1, 3), st.floats(0.001, 0.5))
def test_the_rule_on_any_history(history, patience, tolerance):
    settled = has_settled(history, patience, tolerance)
    if len(history) <= patience:
        assert not settled
        return
    now = history[-1]
    for before in history[-patience - 1 : -1]:
        both = before.keys() & now.keys()
        if not both or not median(abs(now[name] - before[name]) / before[name] for name in both) < tolerance:
            assert not settled
            return
    assert settled


@given(st.floats(0.5, 50), st.integers(1, 4))
def test_what_stands_still_has_settled_and_stays_so(rank, patience):
    assert not has_settled([{"a": rank}] * patience, patience)
    assert has_settled([{"a": rank}] * (patience + 1), patience)
    assert has_settled([{"a": 3 * rank}] + [{"a": rank}] * (patience + 1), patience)
    assert not has_settled([{"a": rank}] * patience + [{"a": 1.05 * rank}], patience)


@pytest.mark.parametrize(
    ("history", "settled"),
    [
        ([10, 9.9, 9.85], True),
        ([10, 9.85, 9.7], False),  # slowly, but on and on
        ([10, 11, 10], False),  # there and back
        ([10, 10, 11, 11, 11], True),
        ([10, float("nan"), 10], False),
        ([0, 0, 0], True),
        ([0, 0, 1], False),
    ],
)
def test_the_rule_on_histories_of_one_layer(history, settled):
    assert has_settled([{"a": one} for one in history]) is settled


def test_the_median_layer_counts():
    still, moving = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 9.0, "b": 2.0, "c": 3.0}
    assert has_settled([still, still, moving])
    assert not has_settled([still, still, {**moving, "b": 9.0}])
    assert not has_settled([{"a": 1.0}, {"a": 1.0}, {"b": 1.0}]), "nothing that can be compared"
