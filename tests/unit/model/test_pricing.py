"""What layers cost that are left out, not trained yet, or not there yet."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import survey
from lr_callback.model.pricing import Prices, dense_bytes, dense_parameters


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_dense_parameters_are_those_before_the_cut():
    model = network()
    before = count(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert count(model) < before == dense_parameters(model)


def size(model):
    """Return the bytes of the tensors in a file of the model, each once."""
    return sum(value.nbytes for value in {value.data_ptr(): value for value in model.state_dict().values()}.values())


def mixed():
    """Return a model of several dtypes, with buffers, one of them not in the file, and a shared weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 96).half(), nn.Linear(96, 64).double())
    model.tied = nn.Linear(64, 64)
    model.tied.weight = model[0].weight
    model.register_buffer("cache", torch.zeros(1000), persistent=False)
    return model


def test_bytes_are_those_of_the_tensors_in_the_file_before_and_after_the_cut():
    model = mixed()
    before = size(model)
    assert dense_bytes(model) == before
    allocation = lrc.allocate(model, 0.5, cost="bytes")
    lrc.factorize_(model, allocation)
    assert (allocation.unit, allocation.dense_cost, allocation.cost) == ("bytes", before, size(model))
    assert dense_bytes(model) == before and len(allocation.factorized) >= 2
    assert "bytes" in allocation.summary()
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation


def test_a_budget_in_bytes_is_one_in_parameters_where_all_have_one_dtype():
    one, other = (lrc.allocate(network(), 0.4, cost=cost) for cost in ("bytes", "parameters"))
    ranks = [{name: (of.num_slices, of.rank) for name, of in by.factorized.items()} for by in (one, other)]
    assert ranks[0] == ranks[1] and one.cost == 4 * other.cost


def test_each_tensor_counts_by_its_own_dtype():
    model = network()
    weight = model[0].weight
    del model[0].weight  # and is put after the bias
    model[0].register_parameter("weight", nn.Parameter(weight.detach().half()))
    allocation = lrc.allocate(model, 0.5, cost="bytes")
    assert allocation.layers["0"].dense_cost == 64 * 64 * 2 + 64 * 4
    lrc.factorize_(model, allocation)
    assert allocation.cost == size(model)


class Plain(nn.Module):
    """Has a state dict of its own making, and a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("graph", torch.eye(4).to_sparse())

    def state_dict(self):
        return {"weights": list(self.parameters())}


def test_bytes_do_not_depend_on_how_a_state_dict_is_made():
    assert dense_bytes(Plain()) == 4 * (64 * 65 + 4 * 4)


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
