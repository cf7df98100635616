"""What layers cost that are left out, not trained yet, or not there yet."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import survey
from lr_callback.model.pricing import Prices


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_multiply_adds_take_a_run_of_the_model():
    with pytest.raises(ValueError, match=r"^cost='multiply_adds' is counted on a run of the model, and there is none"):
        Prices("multiply_adds")


@pytest.mark.parametrize("choice", [{"exclude": ["0"]}, {"include": ["2"]}])
def test_a_factorized_layer_that_is_left_out_becomes_dense_and_the_cost_is_that_of_the_model(choice):
    model = network()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    allocation = lrc.allocate(model, 0.7, **choice)
    lrc.factorize_(model, allocation)
    assert count(model) == allocation.cost
    assert type(model[0]) is nn.Linear and allocation.layers["0"] is None


def test_a_survey_counts_on_layers_that_are_zero_before_the_training():
    model = network()
    nn.init.zeros_(model[2].weight)
    assert survey(model).reachable[0] == survey(network()).reachable[0]
    assert "2" in lrc.analyze(model).skipped


def test_a_survey_refuses_weights_that_are_not_finite():
    model = network()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^2: every weight must be finite"):
        survey(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_cannot_be_counted_and_is_named():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"^1\.weight: it is not initialised yet.*run one batch first"):
        lrc.allocate(model, 0.5)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert lrc.allocate(network(), numpy.float32(0.5)).keep_ratio == 0.5
    assert lrc.LowRankCompression([0.5, 0.3], epochs=range(1, 3)).events == {1: 0.5, 2: 0.3}
    assert lrc.LowRankCompression(0.5, epochs=numpy.int64(3)).events == {3: 0.5}
