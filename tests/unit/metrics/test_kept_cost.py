"""Kept cost: kept over dense, of numbers, of a model and of an allocation."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.metrics import KeptCost
from lr_callback.metrics.functional import kept_cost


@pytest.mark.parametrize(
    ("kept", "dense"), [(30, 120), (0, 7), (7, 7), (80_902, 269_722), (5_190_533_121, 9_000_000_007)]
)
def test_it_is_kept_over_dense(kept, dense):
    metric = KeptCost()
    metric.update(kept, dense)
    for found in (metric.compute(), kept_cost(kept, dense)):
        assert float(found) == pytest.approx(kept / dense, rel=1e-6)


def test_several_are_all_that_is_kept_over_all_that_was():
    metric = KeptCost()
    metric.update(2**53 + 1, 2**55)
    assert float(metric(1, 2**55)) == 2.0**-55
    assert (int(metric.kept), int(metric.dense)) == (2**53 + 2, 2**56), "whole numbers, to the last digit"


def test_of_a_model_and_of_its_allocation():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10))
    dense = sum(one.numel() for one in model.parameters())
    before = nn.Sequential(*model)
    assert kept_cost(model) == 1
    allocation = lrc.allocate(model, 0.5)
    lrc.factorize_(model, allocation)
    left = sum(one.numel() for one in model.parameters())
    for given in ((model,), (model, dense), (model, before), (left, dense), (left, before), (allocation,)):
        metric = KeptCost()
        metric.update(*given)
        for found in (metric.compute(), kept_cost(*given)):
            assert float(found) == pytest.approx(left / dense, rel=1e-6)


def test_what_is_no_cost_is_refused_and_nothing_is_added():
    metric, allocation = KeptCost(), lrc.Allocation({}, {}, {}, 5, 10, 5, 0.5)
    for given, kind, text in (
        ((1, 0), ValueError, "`dense` must be above 0 and `kept` at least 0, got 0 and 1"),
        ((1, -5), ValueError, "`dense` must be above 0 and `kept` at least 0, got -5 and 1"),
        ((-1, 5), ValueError, "`dense` must be above 0 and `kept` at least 0, got 5 and -1"),
        ((nn.ReLU(),), ValueError, "`dense` must be above 0 and `kept` at least 0, got 0 and 0"),
        ((0.5, 5), TypeError, "`kept` must be a whole number or a model, or an Allocation alone, got 0.5"),
        ((2**63, 2**64), ValueError, r"costs must be below 2 \*\* 63, choose a larger unit; got"),
        ((True, 5), TypeError, "`kept` must be a whole number or a model, or an Allocation alone, got True"),
        ((5,), TypeError, "`dense` must be a whole number or a model, whose cost is compared with, got None"),
        ((5, torch.ones(2)), TypeError, "`dense` must be .*, got an object of the type Tensor"),
        ((allocation, 10), TypeError, "an Allocation knows its dense cost: leave out `dense`, got 10"),
    ):
        for function in (metric.update, kept_cost):
            with pytest.raises(kind, match=f"KeptCost: {text}"):
                function(*given)
    with pytest.raises(ValueError, match="it is not initialised yet"):
        kept_cost(nn.Sequential(nn.LazyLinear(3)))
    assert not metric.kept and not metric.dense
