"""Parameters and bytes of a model, as it stands and with all layers dense."""

import torch
from torch import nn

import lr_callback as lrc
from lr_callback.model.held import dense_bytes, dense_parameters, held_bytes, held_parameters


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def test_dense_parameters_are_those_before_the_cut():
    model = network()
    before = held_parameters(model)
    assert before == sum(parameter.numel() for parameter in model.parameters())
    allocation = lrc.allocate(model, 0.5)
    lrc.factorize_(model, allocation)
    assert held_parameters(model) == allocation.cost < before == dense_parameters(model)


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
    assert held_bytes(model) == size(model) < before
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
