"""Layers: the factorized forms, and the table of types."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.decisions.costs import Call
from lr_callback.layers import SlicedLinear, dense_bias
from lr_callback.layers.layer_types import LAYER_TYPES, dense_weight, full_name, layer_type

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="circular")


def test_a_sliced_linear_is_one_linear_map_for_each_slice():
    layer = SlicedLinear(6, 4, num_slices=2)
    inputs = torch.randn(5, 3, 6)
    parts = [part @ weight.T for part, weight in zip(inputs.split(3, -1), layer.weight.split(2), strict=True)]
    assert torch.allclose(layer(inputs), torch.cat(parts, -1), atol=1e-6)


def test_a_sliced_linear_starts_with_weights_as_torch_draws_them():
    torch.manual_seed(0)
    layer = SlicedLinear(64, 32, num_slices=4)
    assert 0.2 < float(layer.weight.detach().abs().max()) <= 0.25
    assert layer.weight.shape == (32, 16)
    assert repr(layer) == "SlicedLinear(in_features=64, out_features=32, num_slices=4)"


@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("leading", [(), (0,), (2,), (2, 0), (2, 1, 3)], ids=str)
def test_a_factorized_linear_takes_any_leading_dimensions_empty_ones_too(num_slices, leading):
    layer = lrc.FactorizedLinear(nn.Linear(12, 5), num_slices, rank=2)
    assert layer(torch.zeros(*leading, 12)).shape == (*leading, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_factorized_linear_describes_itself(bias):
    layer = lrc.FactorizedLinear(nn.Linear(12, 5, bias=bias), num_slices=3, rank=2)
    assert (layer.in_features, layer.out_features, layer.num_slices, layer.rank) == (12, 5, 3, 2)
    assert layer.weight.shape == (5, 12)
    assert (layer.bias is not None) == bias
    assert [factor.shape for factor in layer.factors] == [(6, 4), (5, 6)]
    assert "folding=kernel_in_encoder, num_slices=3, rank=2" in repr(layer)


def test_a_factorized_convolution_keeps_the_attributes_that_code_around_it_reads():
    layer = lrc.FactorizedConv2d(CONVOLUTION, 4, 2, "width_in_decoder")
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(CONVOLUTION, name)
    assert repr(layer.dense_skeleton()) == repr(CONVOLUTION)


@pytest.mark.parametrize(
    ("folding", "encoder", "decoder"),
    [
        ("kernel_in_encoder", ((3, 5), (2, 1), (1, 2), (1, 2)), ((1, 1), (1, 1), (0, 0), (1, 1))),
        ("height_in_decoder", ((1, 5), (1, 1), (0, 2), (1, 2)), ((3, 1), (2, 1), (1, 0), (1, 1))),
        ("width_in_decoder", ((3, 1), (2, 1), (1, 0), (1, 1)), ((1, 5), (1, 1), (0, 2), (1, 2))),
        ("kernel_in_decoder", ((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 5), (2, 1), (1, 2), (1, 2))),
    ],
)
def test_kernel_stride_padding_and_dilation_go_with_their_axis(folding, encoder, decoder):
    layer = lrc.FactorizedConv2d(CONVOLUTION, 4, 2, folding)
    for factor, wanted in ((layer.encoder, encoder), (layer.decoder, decoder)):
        assert (factor.kernel_size, factor.stride, factor.padding, factor.dilation) == wanted
    assert (layer.encoder.groups, layer.decoder.groups) == (4, 1)
    assert layer.encoder.bias is None


def test_the_weight_is_differentiable_in_both_factors():
    layer = lrc.FactorizedLinear(nn.Linear(6, 4), 2, 2)
    for factor in layer.factors:
        nn.init.ones_(factor)
    layer.weight.sum().backward()
    assert all(bool(factor.grad.any()) for factor in layer.factors)


@pytest.mark.parametrize("dense", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("training", [True, False])
def test_to_dense_gives_a_copy_that_does_the_same(dense, training):
    model = nn.Sequential(copy.deepcopy(dense)).train(training)
    lrc.factorize_(model, lrc.allocate(model, 0.9))
    layer = model[0]
    made = layer.to_dense()
    inputs = torch.randn(2, 6) if isinstance(dense, nn.Linear) else torch.randn(2, 6, 5, 5)
    assert type(made) is type(dense)
    assert made.training == training
    assert torch.allclose(made(inputs), layer(inputs), atol=1e-5)
    assert made.bias is not layer.bias
    assert torch.equal(made.bias, layer.bias)


def test_building_and_densifying_draw_no_random_numbers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 16, 2))
    before = torch.get_rng_state()
    lrc.factorize_(model, lrc.allocate(model, 0.6))
    lrc.densify_(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factorized_layer_may_be_called_by_the_name_of_torch_argument():
    layer = lrc.FactorizedLinear(nn.Linear(4, 4), 1, 1)
    inputs = torch.ones(2, 4)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(layer(input=inputs), layer(inputs))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_factorized_layers_can_be_copied_and_pickled(copying):
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    lrc.factorize_(model, lrc.allocate(model, 0.6))
    inputs = torch.randn(1, 4, 5, 5)
    assert torch.equal(copying(model)(inputs), model(inputs))


def test_the_table_knows_dense_types_exactly_and_their_factorized_forms():
    class Special(nn.Linear):
        pass

    for dense in (nn.Linear(2, 2), *(kind(2, 2, 1) for kind in CONVOLUTIONS), nn.Embedding(2, 2)):
        kind = layer_type(dense)
        assert kind.__name__ == f"Factorized{type(dense).__name__}"
        assert layer_type(kind(dense, 1, 1)) is kind
    assert sum(name.startswith("torch.nn.") for name in LAYER_TYPES) == 8
    for other in (Special(2, 2), nn.Bilinear(2, 2, 1), nn.ReLU()):
        assert layer_type(other) is None


def test_a_row_that_is_added_is_known_from_then_on(monkeypatch):
    class Special(nn.Linear):
        pass

    class FactorizedSpecial(lrc.FactorizedLinear):
        pass

    monkeypatch.setitem(LAYER_TYPES, full_name(Special), FactorizedSpecial)
    assert layer_type(Special(2, 2)) is layer_type(FactorizedSpecial(Special(2, 2), 1, 1)) is FactorizedSpecial
    assert layer_type(nn.Linear(2, 2)) is lrc.FactorizedLinear


def test_dense_weight_is_detached_and_dense_bias_the_parameter_itself():
    dense = nn.Linear(4, 4)
    factorized = lrc.FactorizedLinear(dense, 1, 1)
    assert not dense_weight(dense).requires_grad
    assert not dense_weight(factorized).requires_grad
    assert dense_bias(dense) is dense.bias
    assert dense_bias(factorized) is factorized.decoder.bias
    assert dense_bias(nn.Linear(4, 4, bias=False)) is None


@pytest.mark.parametrize(
    ("layer", "shape", "call"),
    [
        (nn.Linear(4, 2), (3, 5, 4), Call(15)),
        (nn.Linear(4, 2), (4,), Call(1)),
        (nn.Conv2d(4, 2, 3, stride=2), (3, 4, 9, 7), Call(3, (9, 7), (4, 3))),
        (nn.Conv2d(4, 2, 3), (4, 9, 7), Call(1, (9, 7), (7, 5))),
    ],
    ids=["linear", "one vector", "convolution", "one image"],
)
def test_a_call_is_described_by_its_sizes(layer, shape, call):
    inputs = torch.zeros(shape)
    assert layer_type(layer).call(inputs, layer(inputs)) == call


@pytest.mark.parametrize("skeleton", [lrc.FactorizedLinear(nn.Linear(4, 4, device="meta"), 2, 1)])
def test_a_layer_on_the_meta_device_is_built_there(skeleton):
    assert all(one.is_meta for one in skeleton.parameters())
    assert skeleton(torch.zeros(3, 4, device="meta")).shape == (3, 4)
