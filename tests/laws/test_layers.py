"""Laws 1 and 9: at full rank a factorized layer is the dense one, and what is built costs what is reported."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lr_callback as lrc
from lr_callback.decisions.costs import COUNTED, Call, CountedCost
from lr_callback.mathematics.folding import FOLDINGS, Geometry, slice_counts

TOLERANCE = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
law = settings(max_examples=40, deadline=None)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def allocation_of(layer, folding, num_slices, rank):
    """Return the allocation that gives a model of one layer, named 0, this structure."""
    choice = lrc.Factorization(folding, num_slices, rank, 0.0, 0, 1)
    return lrc.Allocation({"0": choice}, {}, {"0": tuple(layer.weight.shape)}, 0, 1, 0, 1.0)


def geometry_of(layer):
    return Geometry(layer.weight.shape[0], layer.weight.shape[1], tuple(layer.weight.shape[2:]))


def relative(found, wanted):
    return float(((found - wanted).norm() / wanted.norm()).detach())


def divisors(channels):
    return st.sampled_from(slice_counts(channels))


@st.composite
def convolutions(draw):
    """Draw a float64 convolution of any configuration without groups, and an input for it."""
    kernel, dilation = draw(pairs), draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.Conv2d(
        draw(st.sampled_from([1, 2, 4, 6])),
        draw(st.integers(1, 7)),
        kernel,
        stride=1 if padding == "same" else draw(pairs),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    inputs = torch.randn(2, layer.in_channels, draw(st.integers(5, 8)), draw(st.integers(5, 8)), dtype=torch.float64)
    if draw(st.booleans()):
        layer, inputs = layer.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    return layer, inputs


@law
@given(case=convolutions(), folding=st.sampled_from(list(FOLDINGS)), data=st.data())
def test_a_convolution_at_full_rank_is_the_dense_one_and_densify_undoes_it(case, folding, data):
    layer, inputs = case
    count = data.draw(divisors(layer.in_channels))
    model = nn.Sequential(copy.deepcopy(layer))
    rank = geometry_of(layer).full_rank(folding, count)
    lrc.factorize_(model, allocation_of(layer, folding, count, rank))
    outputs, wanted = model(inputs), layer(inputs)
    assert outputs.shape == wanted.shape
    assert relative(outputs, wanted) < TOLERANCE
    assert relative(model[0].weight, layer.weight) < TOLERANCE
    lrc.densify_(model)
    assert type(model[0]) is nn.Conv2d
    assert repr(model[0]) == repr(layer)
    assert relative(model[0].weight, layer.weight) < TOLERANCE
    assert relative(model(inputs), wanted) < TOLERANCE


@law
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    sizes=st.tuples(st.sampled_from([1, 4, 6, 12]), st.integers(1, 9)),
    bias=st.booleans(),
    data=st.data(),
)
def test_a_linear_layer_at_full_rank_is_the_dense_one_with_any_leading_dimensions(leading, sizes, bias, data):
    layer = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    inputs = torch.randn(*leading, sizes[0], dtype=torch.float64)
    count = data.draw(divisors(sizes[0]))
    model = nn.Sequential(copy.deepcopy(layer))
    rank = geometry_of(layer).full_rank("kernel_in_encoder", count)
    lrc.factorize_(model, allocation_of(layer, "kernel_in_encoder", count, rank))
    assert model(inputs).shape == layer(inputs).shape
    assert relative(model(inputs), layer(inputs)) < TOLERANCE
    lrc.densify_(model)
    assert repr(model[0]) == repr(layer)
    assert relative(model(inputs), layer(inputs)) < TOLERANCE


@law
@given(case=convolutions(), folding=st.sampled_from(list(FOLDINGS)), data=st.data())
def test_at_any_rank_the_product_of_the_factors_is_the_layer_that_runs(case, folding, data):
    layer, inputs = case
    count = data.draw(divisors(layer.in_channels))
    rank = data.draw(st.integers(1, geometry_of(layer).full_rank(folding, count)))
    model = nn.Sequential(layer)
    lrc.factorize_(model, allocation_of(layer, folding, count, rank))
    assert model[0].rank == rank
    outputs = model(inputs)
    assert relative(model[0].to_dense()(inputs), outputs) < TOLERANCE


@law
@given(case=convolutions(), folding=st.sampled_from(list(FOLDINGS)), data=st.data())
def test_the_cost_of_a_convolution_is_that_of_the_layer_that_is_built(case, folding, data):
    layer, inputs = case
    count = data.draw(divisors(layer.in_channels))
    rank = data.draw(st.integers(1, geometry_of(layer).full_rank(folding, count)))
    outputs = layer(inputs)
    bias = 0 if layer.bias is None else layer.bias.numel()
    call = Call(inputs.shape[0], tuple(inputs.shape[2:]), tuple(outputs.shape[2:]))
    parameters = CountedCost(geometry_of(layer), bias)
    multiply_adds = CountedCost(geometry_of(layer), bias, (call,))
    assert counted(layer, inputs) == multiply_adds.dense
    model = nn.Sequential(layer)
    assert parameters.dense == sum(one.numel() for one in model.parameters())
    lrc.factorize_(model, allocation_of(layer, folding, count, rank))
    assert sum(one.numel() for one in model.parameters()) == parameters.factorized(folding, count, rank)
    assert counted(model, inputs) == multiply_adds.factorized(folding, count, rank)


def counted(module, inputs):
    """Return the multiply-adds that torch counts in one call."""
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() / 2


def all_costs(model, inputs) -> dict[str, float]:
    """Count what a model costs in every unit, from the model itself."""
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "multiply_adds": counted(model, inputs),
        "bytes": sum(one.nbytes for one in model.state_dict().values()),
    }


@settings(max_examples=12, deadline=None)
@given(keep_ratio=st.floats(0.3, 1.0), cost=st.sampled_from(COUNTED), seed=st.integers(0, 99))
def test_the_cost_of_an_allocation_is_that_of_the_model_that_is_built(keep_ratio, cost, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 24, 3),
        nn.Flatten(),
        nn.Linear(216, 10),
    )
    inputs = torch.zeros(2, 3, 10, 10)
    method = lrc.ALDS(foldings=list(FOLDINGS))
    allocation = lrc.allocate(model, keep_ratio, cost=cost, method=method, example_input=inputs)
    assert allocation.dense_cost == all_costs(model, inputs)[cost]
    report = lrc.factorize_(model, allocation)
    assert all_costs(model, inputs)[cost] == allocation.cost <= allocation.budget
    assert allocation.budget <= keep_ratio * allocation.dense_cost * (1 + 1e-9)
    assert report.parameters_after == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("layer", [nn.Linear(24, 18), nn.Conv2d(6, 8, 3, padding=1)], ids=["linear", "convolution"])
def test_at_full_rank_other_precisions_lose_little_and_stay_themselves(layer, dtype, tolerance):
    layer = copy.deepcopy(layer).to(dtype)
    model = nn.Sequential(copy.deepcopy(layer))
    rank = geometry_of(layer).full_rank("kernel_in_encoder", 2)
    lrc.factorize_(model, allocation_of(layer, "kernel_in_encoder", 2, rank))
    assert {one.dtype for one in model.parameters()} == {dtype}
    assert relative(model[0].weight.double(), layer.weight.double()) < tolerance
    inputs = torch.randn(3, 24) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 8, 8)
    assert relative(model(inputs.to(dtype)).double(), layer(inputs.to(dtype)).double()) < 2 * tolerance
