"""Relative layer errors: those of the pair that is given, and refusals of what is none."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.mathematics.measured import MEASURED
from lr_callback.metrics import RelativeLayerError
from lr_callback.metrics.functional import relative_layer_error


@pytest.fixture
def pairs():
    """Return dense layers, one transposed with groups, and what became of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 24, 3, groups=2))
    dense = copy.deepcopy(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    return list(zip(dense, model, strict=True))


@pytest.mark.parametrize("error", MEASURED)
def test_reductions_are_over_the_layers(pairs, error):
    numbers = [relative_layer_error(*pair, error).item() for pair in pairs]
    assert len(set(numbers)) == 3
    for reduction, wanted in (("max", max(numbers)), ("min", min(numbers)), ("mean", sum(numbers) / 3)):
        metric = RelativeLayerError(error, reduction)
        for pair in pairs:
            metric.update(*pair)
        assert metric.compute().item() == pytest.approx(wanted, rel=1e-6)


def test_a_weight_is_as_good_as_its_layer_and_no_change_is_no_error(pairs):
    for dense, made in pairs:
        assert relative_layer_error(dense.weight, made) == relative_layer_error(dense, made) > 0
        assert relative_layer_error(made.to_dense(), made) < 1e-6
        assert relative_layer_error(made, made) < 1e-6
        assert relative_layer_error(dense, copy.deepcopy(dense)) == 0, "a layer that has stayed dense"


def test_gradients_reach_the_factors(pairs):
    for dense, made in pairs:
        relative_layer_error(dense, made).backward()
        assert all(factor.grad.any() for factor in made.factors)


def test_a_factor_that_is_no_number_is_seen(pairs):
    _, made = pairs[0]
    with torch.no_grad():
        made.factors[0][0, 0] = torch.nan
    metric = RelativeLayerError()
    for pair in pairs:
        metric.update(*pair)
    assert metric.compute().isnan()


@pytest.mark.parametrize("value", [["max"], {"a": 1}, "largest", None], ids=str)
def test_settings_that_there_are_not_are_refused(value):
    with pytest.raises(ValueError, match="RelativeLayerError: `reduction` must be one of"):
        RelativeLayerError(reduction=value)
    with pytest.raises(ValueError, match="RelativeLayerError: `error` must be one of"):
        RelativeLayerError(error=value)


def test_what_is_no_pair_is_refused_and_nothing_is_added(pairs):
    metric, (dense, made), (_, other) = RelativeLayerError(), pairs[0], pairs[2]
    zero = torch.zeros(64, 64)
    for given, kind, text in (
        ((dense, nn.ReLU()), TypeError, "`factorized` must be a layer of a type .*, got an object of the type ReLU"),
        ((nn.ReLU(), made), TypeError, "`dense` must be a layer .*, or a weight, got an object of the type ReLU"),
        ((3, made), TypeError, "`dense` must be a layer .*, or a weight, got an object of the type int"),
        ((nn.Linear(64, 31), made), ValueError, r"must have the same sizes, got .*out_channels=31.* as dense and"),
        ((zero[1:], made), ValueError, r"must have the shape \(64, 64\) and a floating dtype, got \(63, 64\)"),
        ((torch.zeros(24, 8, 3, 3), other), ValueError, r"must have the shape \(16, 12, 3, 3\)"),
        ((zero.long(), made), ValueError, r"a floating dtype, got \(64, 64\) in torch.int64"),
        ((zero, made), ValueError, "the dense weight is all zero, there is nothing to measure an error against"),
    ):
        for function in (metric.update, relative_layer_error):
            with pytest.raises(kind, match=f"RelativeLayerError: .*{text}"):
                function(*given)
    assert metric.count == 0
    for function in (RelativeLayerError, lambda error: relative_layer_error(dense, made, error)):
        with pytest.raises(ValueError, match=r"`error` must be one of .*'frobenius'.*, got 'activation'"):
            function("activation")
    with pytest.raises(ValueError, match=r"RelativeLayerError: `reduction` must be one of .*, got 'sum'"):
        RelativeLayerError(reduction="sum")
