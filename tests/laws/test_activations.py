"""Law 9 in bytes that are kept for the backward pass, and in a unit of one's own: what is told is what is built."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lr_callback.layers.layer_types import build_form
from lr_callback.layers.weightless import Forms, weightless
from lr_callback.model.observe import observe
from lr_callback.units.activations import ActivationCost
from lr_callback.units.own_cost import OwnCost
from tests.laws.test_layer_types import cases, law

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


class Around(nn.Module):
    """A layer that is called twice, each time on what has a gradient, with something that is always kept."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.before = layer, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs):
        given = [inputs * self.before if inputs.is_floating_point() else inputs for _ in range(2)]
        return sum(self.layer(one).tanh().sum() for one in given) + self.before.exp()


def kept(model, *inputs):
    """Return the bytes of what autograd saves, every tensor held until it is counted."""
    held = []

    def note(tensor):
        held.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(*inputs)
    apart = {one.untyped_storage().data_ptr() for one in [*inputs, *model.parameters(), *model.buffers()]}
    found = {one.data_ptr(): one.nbytes() for one in held}
    del outputs
    return sum(size for address, size in found.items() if address not in apart and address)


def observed(model, inputs):
    return observe(model, inputs, activations=True).activations


@law
@given(cases(), st.booleans())
def test_what_a_built_layer_keeps_is_what_is_told_of_it(case, frozen):
    case.layer.weight.requires_grad_(not frozen)
    dense, built = Around(case.layer), Around(case.built()[0])
    found = observed(dense, case.inputs)
    assert found.dense == kept(dense, case.inputs)
    cost = ActivationCost.of(case.layer, found.calls["layer"])
    costs = cost.at_ranks(case.folding, case.num_slices, case.rank)
    assert costs[case.rank] - cost.dense == kept(built, case.inputs) - found.dense
    assert observed(built, case.inputs).dense == found.dense, "whatever is factorized"


@law
@given(cases())
def test_forms_without_values_are_those_that_are_built(case):
    built = build_form(case.layer, case.folding, case.num_slices, case.rank)
    form = Forms(weightless(case.layer), case.folding, case.num_slices).at(case.rank)
    assert repr(form) == repr(built) and type(form) is type(built)
    for own, other in zip(form.parameters(), built.parameters(), strict=True):
        assert (own.shape, own.dtype, own.device.type) == (other.shape, other.dtype, "meta")
    assert [vars(form)[name] for name in built.attributes] == [vars(built)[name] for name in built.attributes]
    assert repr(weightless(built)) == repr(case.layer)


@law
@given(cases())
def test_a_cost_of_ones_own_is_that_of_the_module_that_is_built(case):
    def edges(module):
        return sum(7 * len(one.shape) + max(one.shape) ** 2 for one in module.parameters())

    own, model = OwnCost(edges), nn.Sequential(case.layer)
    cost = own.of_layer(case.layer)
    dense = own.of_model(model, {"0": case.layer})
    built = case.built()
    at = cost.at_ranks(case.folding, case.num_slices, case.rank)[case.rank]
    assert edges(built) == dense - cost.dense + at
    assert own.of_model(built, {"0": built[0]}) == dense == edges(model)
