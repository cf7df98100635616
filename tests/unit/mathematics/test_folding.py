"""Folding against explicit loops over output channels, input channels and kernel positions."""

from itertools import product
from math import prod

import pytest
import torch
from torch.nn.functional import conv2d

from lr_callback.decisions.costs import CountedCost
from lr_callback.mathematics.folding import (
    FOLDINGS,
    Geometry,
    compose,
    decoder_axes,
    fold,
    slice_counts,
    unfold_decoder,
    unfold_encoder,
)

NAMES = list(FOLDINGS)
KERNELS = [(), (1, 1), (3, 3), (2, 5), (1, 3), (3, 1)]
SIZES = [(4, 6, 3), (1, 1, 1), (5, 7, 7), (3, 12, 4), (2, 7, 1)]  # F, C, k


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(prod(shape)))


def row_major(index: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    place = 0
    for one, size in zip(index, sizes, strict=True):
        place = place * size + one
    return place


def fold_by_loops(weight: torch.Tensor, folding: str, num_slices: int) -> torch.Tensor:
    (filters, channels), kernel = weight.shape[:2], tuple(weight.shape[2:])
    own = [axis for axis in range(len(kernel)) if axis - len(kernel) in FOLDINGS[folding]]
    other = [axis for axis in range(len(kernel)) if axis - len(kernel) not in FOLDINGS[folding]]
    decoder, encoder = (tuple(kernel[axis] for axis in axes) for axes in (own, other))
    width = channels // num_slices
    folded = weight.new_full((num_slices, filters * prod(decoder), width * prod(encoder)), torch.nan)
    for f, c in product(range(filters), range(channels)):
        for position in product(*map(range, kernel)):
            row = f * prod(decoder) + row_major(tuple(position[axis] for axis in own), decoder)
            column = c % width * prod(encoder) + row_major(tuple(position[axis] for axis in other), encoder)
            folded[c // width, row, column] = weight[(f, c, *position)]
    return folded


@pytest.mark.parametrize("folding", NAMES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fold_puts_every_entry_where_the_loops_put_it(sizes, kernel, folding):
    filters, channels, num_slices = sizes
    weight = draw(filters, channels, *kernel)
    assert torch.equal(fold(weight, folding, num_slices), fold_by_loops(weight, folding, num_slices))


@pytest.mark.parametrize("folding", NAMES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_geometry_states_the_shapes_of_what_is_folded(kernel, folding):
    geometry = Geometry(5, 12, kernel)
    assert geometry.weight_shape == (5, 12, *kernel)
    for num_slices in slice_counts(12):
        folded = fold(draw(5, 12, *kernel), folding, num_slices)
        assert folded.shape == (num_slices, *geometry.matrix_shape(folding, num_slices))
        assert geometry.full_rank(folding, num_slices) == min(folded.shape[1:])
    both = zip(geometry.encoder_kernel(folding), geometry.decoder_kernel(folding), strict=True)
    assert tuple(a * b for a, b in both) == kernel


@pytest.mark.parametrize("folding", NAMES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_composed_factors_fold_to_the_product_of_their_matrices(sizes, kernel, folding):
    filters, channels, num_slices = sizes
    geometry, rank = Geometry(filters, channels, kernel), 2
    rows, columns = geometry.matrix_shape(folding, num_slices)
    left, right = draw(num_slices, rows, rank), draw(num_slices, rank, columns)
    encoder, decoder = unfold_encoder(right, geometry, folding), unfold_decoder(left, geometry, folding)
    assert encoder.shape == (num_slices * rank, channels // num_slices, *geometry.encoder_kernel(folding))
    assert decoder.shape == (filters, num_slices * rank, *geometry.decoder_kernel(folding))
    weight = compose(encoder, decoder, num_slices)
    assert weight.shape == geometry.weight_shape
    torch.testing.assert_close(fold_by_loops(weight, folding, num_slices), left @ right)


@pytest.mark.parametrize("folding", NAMES)
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (0, 0)), ((2, 3), (1, 2)), ((3, 1), (0, 4))], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 3), (1, 1)], ids=str)
def test_two_convolutions_do_what_the_composed_weight_does(kernel, stride, padding, folding):
    filters, channels, num_slices, rank = 4, 6, 3, 2
    geometry, own = Geometry(filters, channels, kernel), decoder_axes(folding, 2)
    encoder = draw(num_slices * rank, channels // num_slices, *geometry.encoder_kernel(folding))
    decoder = draw(filters, num_slices * rank, *geometry.decoder_kernel(folding))

    def of(values: tuple[int, int], pointwise: int, mine: bool) -> tuple[int, ...]:
        return tuple(value if (axis in own) == mine else pointwise for axis, value in enumerate(values))

    images = draw(2, channels, 11, 13)
    inner = conv2d(images, encoder, stride=of(stride, 1, False), padding=of(padding, 0, False), groups=num_slices)
    outer = conv2d(inner, decoder, stride=of(stride, 1, True), padding=of(padding, 0, True))
    dense = conv2d(images, compose(encoder, decoder, num_slices), stride=stride, padding=padding)
    torch.testing.assert_close(outer, dense, rtol=1e-10, atol=1e-10)


def test_compose_of_a_linear_layer_is_a_sum_over_slices_and_ranks():
    encoder, decoder = draw(6, 4), draw(5, 6)  # k = 3, j = 2, C = 12
    expected = torch.zeros(5, 12, dtype=torch.float64)
    for i, j, f, c in product(range(3), range(2), range(5), range(4)):
        expected[f, 4 * i + c] += decoder[f, 2 * i + j] * encoder[2 * i + j, c]
    torch.testing.assert_close(compose(encoder, decoder, 3), expected)


@pytest.mark.parametrize("folding", NAMES)
def test_compose_is_differentiable_in_both_factors(folding):
    geometry = Geometry(2, 4, (2, 3))
    encoder = draw(4, 2, *geometry.encoder_kernel(folding)).requires_grad_()
    decoder = draw(2, 4, *geometry.decoder_kernel(folding)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: compose(a, b, 2), (encoder, decoder))


@pytest.mark.parametrize("folding", NAMES)
def test_fold_reads_any_memory_layout(folding):
    weight = draw(4, 6, 3, 5)
    expected = fold(weight, folding, 3)
    assert torch.equal(fold(weight.to(memory_format=torch.channels_last), folding, 3), expected)
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(fold(strided, folding, 3), expected)


def test_fold_copies_nothing_where_strides_allow_it():
    weight = draw(4, 6, 3, 3)
    assert fold(weight, "kernel_in_encoder", 3).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fold_and_compose_keep_the_dtype(dtype):
    assert fold(draw(4, 6, 3, 3).to(dtype), "height_in_decoder", 2).dtype == dtype
    assert compose(draw(4, 3, 1, 3).to(dtype), draw(4, 4, 3, 1).to(dtype), 2).dtype == dtype


@pytest.mark.parametrize("num_slices", [0, -2, 5, 24])
def test_slices_that_do_not_divide_the_channels_are_refused(num_slices):
    message = rf"`num_slices` must divide the 12 input channels, got {num_slices}; divisors: \[1, 2, 3, 4, 6, 12\]"
    with pytest.raises(ValueError, match=message):
        fold(draw(3, 12), "kernel_in_encoder", num_slices)


@pytest.mark.parametrize(
    "ask", [lambda name: decoder_axes(name, 2), lambda name: fold(draw(2, 2), name, 1), Geometry(2, 2).decoder_kernel]
)
def test_an_unknown_folding_is_refused_with_the_known_ones(ask):
    with pytest.raises(ValueError, match=r"`folding` must be one of \['kernel_in_encoder', .*\], got 'sideways'"):
        ask("sideways")


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_distinct_foldings_drops_exactly_those_with_the_matrices_of_an_earlier_one(kernel):
    weight, kept = draw(4, 6, *kernel), []
    for name in NAMES:
        folded = fold_by_loops(weight, name, 1)
        if not any(torch.equal(folded, fold_by_loops(weight, earlier, 1)) for earlier in kept):
            kept.append(name)
    assert CountedCost(Geometry(4, 6, kernel)).distinct_foldings(tuple(NAMES)) == tuple(kept)


def test_distinct_foldings_prefers_the_one_with_the_fewest_axes_in_the_decoder():
    backwards = ("kernel_in_decoder", "width_in_decoder", "height_in_decoder", "kernel_in_encoder")
    assert CountedCost(Geometry(4, 6, (1, 3))).distinct_foldings(backwards) == ("width_in_decoder", "kernel_in_encoder")
    assert CountedCost(Geometry(4, 6, (3, 3))).distinct_foldings(backwards) == backwards


def test_distinct_foldings_drops_a_name_that_is_repeated():
    twice = ("width_in_decoder", "kernel_in_encoder", "width_in_decoder")
    assert CountedCost(Geometry(4, 6, (3, 3))).distinct_foldings(twice) == ("width_in_decoder", "kernel_in_encoder")


@pytest.mark.parametrize(
    ("channels", "limit", "expected"),
    [(1, None, [1]), (7, None, [1, 7]), (48, 8, [1, 2, 3, 4, 6, 8]), (12, 100, [1, 2, 3, 4, 6, 12]), (12, 1, [1])],
)
def test_slice_counts_are_the_divisors_up_to_the_limit(channels, limit, expected):
    assert slice_counts(channels, limit) == expected
