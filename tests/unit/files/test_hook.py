"""Hook: what a state dict cannot give a module is refused before a layer is replaced; all else is torch's matter."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def tied(model):
    model[2].weight = model[0].weight
    return model


def expanded_bias(model):
    model[0].bias = nn.Parameter(torch.zeros(1).expand(64))
    return model


def compressed(model):
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    return model


def changed(name, change):
    """Return a file of a compressed model in which one entry is another, or missing."""
    state = dict(compressed(network(1)).state_dict())
    value = change(state.pop(name))
    return state if value is None else {**state, name: value}


ONE = "0.decoder.weight"
FILES = {
    "shape": (network, lambda one: one[:-1], r"^0: the factors in the state dict must multiply to a weight of shape"),
    "one factor": (network, lambda one: None, r"^0: .* found 0\.encoder\.weight.*the other factor is missing"),
    "whole": (network, lambda one: one.long(), r"`source`: 0\.decoder\.weight must be floating point, found"),
    "range": (network, lambda one: one.double() * 1e200, r"`source`: 0\.decoder\.weight must be within the range of"),
    "tied": (
        lambda: tied(network()),
        lambda one: one,
        r"^0: .*can only be dense here: its weight is tied to that of 2",
    ),
    "expanded": (
        lambda: expanded_bias(network()),
        lambda one: one,
        r"`model`: 0\.bias must be a .* that can be written",
    ),
}


@pytest.mark.situation("Bad input", "load_state_dict of a tampered file into a prepared module", "refused")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("make", "change", "message"), FILES.values(), ids=FILES)
def test_what_restore_refuses_the_hook_refuses_too_and_nothing_is_changed(make, change, message, strict):
    model, state = lrc.prepare(make()), changed(ONE, change)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=rf"{message}.*Nothing was changed"):
        model.load_state_dict(state, strict=strict)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_factors_that_are_assigned_may_be_of_another_dtype():
    model, state = lrc.prepare(network()), changed(ONE, lambda one: one.double() * 1e200)
    model.load_state_dict(state, assign=True)
    assert torch.equal(model[0].decoder.weight, state[ONE])
    assert model[0].decoder.weight.dtype == torch.float64


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("own", ["dense", "factorized"])
def test_a_prepared_part_of_a_larger_module_stays_as_it_is(own):
    part = network() if own == "dense" else compressed(network())
    model = Holder(lrc.prepare(part))
    source = compressed(network(1)) if own == "dense" else network(1)
    state = Holder(source).state_dict()
    name = "inner.0.encoder.weight" if own == "dense" else "inner.0.weight"
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"^inner: .*0.*Nothing in it was changed"):
        model.load_state_dict({**state, name: state[name][:, :3]})
    assert list(model.modules()) == modules
    model.load_state_dict(state)
    assert type(part[0]) is type(source[0])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_dense_file_of_other_shapes_is_torchs_matter():
    model = lrc.prepare(network())
    state = {**network(1).state_dict(), "0.bias": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.bias"):
        model.load_state_dict(state)
    assert torch.equal(model[2].weight, state["2.weight"])
    missing, unexpected = model.load_state_dict({"9.encoder.weight": torch.zeros(3)}, strict=False)
    assert unexpected == ["9.encoder.weight"]
    assert len(missing) == 4


def test_a_part_of_a_file_may_be_loaded():
    model, source = lrc.prepare(network()), compressed(network(1)).state_dict()
    before = model[2].weight.clone()
    part = {name: value for name, value in source.items() if name.startswith("0.")}
    assert model.load_state_dict(part, strict=False).unexpected_keys == []
    assert isinstance(model[0], lrc.FactorizedLinear)
    assert torch.equal(model[0].encoder.weight, source["0.encoder.weight"])
    assert torch.equal(model[2].weight, before)
