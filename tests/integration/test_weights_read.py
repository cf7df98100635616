"""Weights that a model reads in parts, turned or through a graph: the product of the factors, in every use."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.functional import linear

import lr_callback as lrc
from lr_callback.common.example import largest_difference


class Turned(nn.Module):
    """An autoencoder whose decoder is its encoder, turned."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(32, 64)

    def forward(self, inputs):
        return linear(self.encoder(inputs).relu(), self.encoder.weight.t())


class InParts(nn.Module):
    """Queries, keys and values in one layer, of which only parts of the weight are used."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    @property
    def queries(self):
        return self.qkv.weight[:32]

    def forward(self, inputs):
        values = linear(inputs, self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2])
        return linear(inputs, self.queries) * values


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, inputs):
        return self.second(input=linear(inputs, self.first.weight, self.first.bias))


def fused():
    """Return a graph in which BatchNorm has been multiplied into the layer before it."""
    layers = [nn.Linear(32, 64), nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
    return fuse(nn.Sequential(*layers, nn.Conv2d(32, 32, 2)).eval())


@pytest.mark.situation("Module tricks", "weights read in parts, turned, or called by hand", "works")
@pytest.mark.parametrize(
    ("make", "names"),
    [(Turned, ("encoder",)), (InParts, ("qkv",)), (ByHand, ("first", "second")), (fused, ("5",))],
)
def test_a_weight_that_is_read_is_the_product_and_learns(make, names):
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(4, 32)
    dense = model(inputs)
    assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized == names
    outputs = model(inputs)
    assert largest_difference(dense, outputs) > 1e-3
    multiplied = copy.deepcopy(model)
    lrc.densify_(multiplied)
    assert largest_difference(multiplied(inputs), outputs) < 1e-5
    outputs.square().mean().backward()
    assert all(factor.grad is not None for name in names for factor in model.get_submodule(name).factors)
    torch.manual_seed(1)
    fresh = make().eval()
    lrc.restore_(fresh, model.state_dict())
    assert torch.equal(fresh(inputs), outputs)
