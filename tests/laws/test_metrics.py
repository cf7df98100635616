"""Law 2, as users measure it: the error of a layer beside the dense one is the one that its allocation says."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.mathematics.measured import MEASURED
from lr_callback.metrics import RelativeLayerError
from lr_callback.metrics.functional import kept_cost, relative_layer_error

RESOLUTION = 1e-6  # a root of an eigenvalue in float64 resolves about 1e-7 of the largest
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def models(draw):
    """Draw some layers of several types and settings; nothing runs through them."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [nn.Linear(draw(st.sampled_from([12, 24, 36])), draw(st.integers(8, 30)))]
    for kind in draw(st.lists(st.sampled_from(CONVOLUTIONS), min_size=1, max_size=3)):
        groups, kernel = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 3))
        layers.append(kind(draw(st.sampled_from([8, 12, 16])), 2 * draw(st.integers(4, 9)), kernel, groups=groups))
    return nn.Sequential(*layers).to(draw(st.sampled_from([torch.float64, torch.float64, torch.float32])))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.sampled_from(list(MEASURED)), st.sampled_from(list(FOLDINGS)), st.floats(0.35, 0.9))
def test_the_error_of_each_layer_of_the_worst_and_on_average_is_that_of_the_allocation(model, error, folding, ratio):
    dense = copy.deepcopy(model)
    allocation = lrc.allocate(model, ratio, method=lrc.ALDS(error, foldings=[folding, "kernel_in_encoder"]))
    lrc.factorize_(model, allocation)
    resolution = RESOLUTION if model[0].bias.dtype == torch.float64 else 1e-5
    worst, mean = RelativeLayerError(error), RelativeLayerError(error, "mean")
    for name, choice in allocation.layers.items():
        pair = dense.get_submodule(name), model.get_submodule(name)
        foreseen = 0.0 if choice is None else choice.relative_error
        assert relative_layer_error(*pair, error).item() == pytest.approx(foreseen, abs=resolution)
        worst.update(*pair)
        mean.update(*pair)
    assert worst.compute().item() == pytest.approx(allocation.worst_error, abs=resolution)
    assert mean.compute().item() == pytest.approx(allocation.mean_error, abs=resolution)
    assert kept_cost(model) == kept_cost(allocation) == kept_cost(model, dense)
