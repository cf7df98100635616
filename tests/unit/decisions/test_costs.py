"""Costs against counted weights and counted products."""

from itertools import product
from math import prod

import pytest
import torch
from torch.nn.functional import conv2d

from lr_callback.decisions.costs import Call, CountedCost, check_cost
from lr_callback.mathematics.folding import FOLDINGS, Geometry, decoder_axes, slice_counts

KERNELS = [(1, 1), (3, 3), (2, 5), (1, 3)]
CALLS = [  # stride, padding, input size
    ((1, 1), (0, 0), (7, 9)),
    ((2, 1), (1, 2), (8, 9)),
    ((3, 2), (0, 1), (11, 6)),
]


def own(values, folding: str, decoder: bool, pointwise: int) -> tuple[int, ...]:
    axes = decoder_axes(folding, 2)
    return tuple(value if (axis in axes) == decoder else pointwise for axis, value in enumerate(values))


def products(outputs: torch.Tensor, weight: torch.Tensor) -> int:
    """Count the multiply-adds of a convolution: each output entry sums over one filter."""
    return outputs.numel() * prod(weight.shape[1:])


@pytest.mark.parametrize("bias", [0, 5])
@pytest.mark.parametrize("kernel", [(), *KERNELS], ids=str)
def test_dense_parameters_are_those_of_weight_and_bias(kernel, bias):
    assert CountedCost(Geometry(5, 12, kernel), bias).dense == torch.empty(5, 12, *kernel).numel() + bias


@pytest.mark.parametrize("folding", FOLDINGS)
@pytest.mark.parametrize("kernel", [(), *KERNELS], ids=str)
def test_factorized_parameters_are_those_of_both_factors_and_the_bias(kernel, folding):
    geometry = Geometry(5, 12, kernel)
    for num_slices, rank in product(slice_counts(12), (1, 2, 5)):
        encoder = torch.empty(num_slices * rank, 12 // num_slices, *geometry.encoder_kernel(folding))
        decoder = torch.empty(5, num_slices * rank, *geometry.decoder_kernel(folding))
        expected = encoder.numel() + decoder.numel() + 5
        assert CountedCost(geometry, bias=5).factorized(folding, num_slices, rank) == expected


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_dense_multiply_adds_are_the_products_of_the_convolution(kernel, call):
    stride, padding, size = call
    weight, images = torch.empty(5, 12, *kernel), torch.empty(2, 12, *size)
    outputs = conv2d(images, weight, stride=stride, padding=padding)
    cost = CountedCost(Geometry(5, 12, kernel), bias=5, calls=(Call(2, size, tuple(outputs.shape[2:])),))
    assert cost.dense == products(outputs, weight)


@pytest.mark.parametrize("folding", FOLDINGS)
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(("num_slices", "rank"), [(1, 3), (4, 2), (12, 1)])
def test_factorized_multiply_adds_are_the_products_of_both_convolutions(num_slices, rank, kernel, call, folding):
    stride, padding, size = call
    geometry, width = Geometry(5, 12, kernel), num_slices * rank
    encoder = torch.zeros(width, 12 // num_slices, *geometry.encoder_kernel(folding))
    decoder = torch.zeros(5, width, *geometry.decoder_kernel(folding))
    strides, paddings = (
        [own(values, folding, side, less) for side in (False, True)] for values, less in ((stride, 1), (padding, 0))
    )
    inner = conv2d(torch.zeros(2, 12, *size), encoder, stride=strides[0], padding=paddings[0], groups=num_slices)
    outer = conv2d(inner, decoder, stride=strides[1], padding=paddings[1])
    cost = CountedCost(geometry, bias=5, calls=(Call(2, size, tuple(outer.shape[2:])),))
    assert cost.factorized(folding, num_slices, rank) == products(inner, encoder) + products(outer, decoder)


@pytest.mark.parametrize("folding", FOLDINGS)
def test_multiply_adds_of_a_linear_layer_are_counted_per_sample(folding):
    cost = CountedCost(Geometry(5, 12), bias=5, calls=(Call(batch=7),))
    assert cost.dense == 7 * 5 * 12
    assert cost.factorized(folding, num_slices=3, rank=2) == 7 * (6 * 4 + 5 * 6)


def test_every_call_of_a_layer_counts():
    geometry, calls = Geometry(4, 6, (3, 3)), (Call(1, (8, 8), (4, 4)), Call(3, (6, 9), (3, 5)))
    together = CountedCost(geometry, calls=calls)
    apart = [CountedCost(geometry, calls=(call,)) for call in calls]
    assert together.dense == sum(one.dense for one in apart)
    for folding in FOLDINGS:
        assert together.per_rank(folding, 2) == sum(one.per_rank(folding, 2) for one in apart)


def test_a_bias_costs_parameters_but_no_multiply_adds():
    geometry = Geometry(4, 6, (3, 3))
    assert CountedCost(geometry, bias=4).fixed == 4
    assert CountedCost(geometry, bias=4, calls=(Call(1, (5, 5), (5, 5)),)).fixed == 0


def test_a_layer_that_is_never_called_takes_no_multiply_adds():
    assert CountedCost(Geometry(4, 6, (3, 3)), bias=4, calls=()).dense == 0


@pytest.mark.parametrize(
    ("axes", "expected"), [((), 2 * 4 * 3), ((0,), 2 * 8 * 3), ((1,), 2 * 4 * 9), ((0, 1), 2 * 8 * 9)], ids=str
)
def test_positions_are_counted_over_the_input_along_the_named_axes(axes, expected):
    assert Call(2, (8, 9), (4, 3)).positions(axes) == expected


def test_the_known_units_pass_and_others_are_refused():
    check_cost("parameters")
    check_cost("multiply_adds")
    with pytest.raises(
        ValueError,
        match=r"`cost` must be one of .*'multiply_adds', 'bytes', 'latency', 'activation_memory'., .* got 'flops'",
    ):
        check_cost("flops")
