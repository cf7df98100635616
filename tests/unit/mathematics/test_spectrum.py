"""Spectra against torch.linalg.svd in float64 of each slice."""

import pytest
import torch

from lr_callback.mathematics.folding import FOLDINGS, fold, slice_counts
from lr_callback.mathematics.spectrum import (
    Slicing,
    is_wide,
    scaled_left_vectors,
    singular_values,
    slicings,
    split,
)

SHAPES = [(1, 1), (1, 12), (12, 1), (8, 12), (12, 8), (7, 13), (40, 12), (10, 48), (6, 36), (48, 48)]
LARGE = [(300, 1200), (1000, 320)]  # more entries than one task takes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def deficient(slices: int, rows: int, columns: int, rank: int) -> torch.Tensor:
    return draw(slices, rows, rank) @ draw(slices, rank, columns, seed=1)


def every_slicing(matrix, crew) -> dict[int, Slicing]:
    return {slicing.num_slices: slicing for slicing in slicings(matrix, slice_counts(matrix.shape[1]), crew)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_count_is_yielded_once_with_its_slices_and_their_gram_matrices(shape, crew):
    matrix = draw(*shape)
    before = matrix.clone()
    listed = list(slicings(matrix, slice_counts(shape[1]), crew))
    assert sorted(slicing.num_slices for slicing in listed) == slice_counts(shape[1])
    for slicing in listed:
        parts = torch.stack(matrix.chunk(slicing.num_slices, dim=1))
        assert torch.equal(slicing.slices, parts)
        wide = parts.shape[2] >= parts.shape[1]
        expected = parts @ parts.mT if wide else parts.mT @ parts
        torch.testing.assert_close(slicing.gram.tril(), expected.tril(), rtol=1e-12, atol=1e-12)
        assert slicing.full_rank == min(parts.shape[1:])
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("counts", [[4, 6], [12, 4, 3], [2, 3], [6], [1, 12]], ids=str)
@pytest.mark.parametrize("rows", [3, 5, 40])
def test_counts_of_which_none_divides_the_other_are_right_too(rows, counts, crew):
    matrix = draw(rows, 24)
    for slicing in slicings(matrix, counts, crew):
        expected = torch.stack([torch.linalg.svdvals(part) for part in matrix.chunk(slicing.num_slices, dim=1)])
        torch.testing.assert_close(singular_values(slicing.gram, crew), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_singular_values_are_those_of_the_svd_of_every_slice(shape, crew):
    matrix = draw(*shape)
    for count, slicing in every_slicing(matrix, crew).items():
        expected = torch.linalg.svdvals(split(matrix, count))
        values = singular_values(slicing.gram, crew)
        assert values.dtype == torch.float64 and values.shape == (count, slicing.full_rank)
        assert (values.diff(dim=-1) <= 0).all()
        assert (values - expected).abs().max() <= 1e-7 * expected.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_low_precision_are_taken_at_their_stored_values(dtype, crew):
    matrix = draw(9, 16).to(dtype)
    for count, slicing in every_slicing(matrix, crew).items():
        expected = torch.linalg.svdvals(split(matrix.double(), count))
        torch.testing.assert_close(singular_values(slicing.gram, crew), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)], ids=str)
def test_singular_values_of_a_deficient_slice_are_zero_beyond_its_rank(shape, crew):
    matrix = deficient(1, *shape, rank=2)[0]
    values = singular_values(every_slicing(matrix, crew)[1].gram, crew)
    assert (values[0, :2] > 0.1).all()
    assert (values[0, 2:] <= 1e-7 * values[0, 0]).all()


def test_singular_values_of_an_empty_slice_are_zero(crew):
    matrix = torch.cat([torch.zeros(5, 6), torch.ones(5, 6)], dim=1)
    values = singular_values(every_slicing(matrix, crew)[2].gram, crew)
    assert values[0].tolist() == [0.0] * 5
    assert values[1, 0].item() == pytest.approx(30**0.5)


@pytest.mark.parametrize("folding", FOLDINGS)
@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 6, 12])
def test_splitting_the_unsliced_fold_gives_the_sliced_fold(num_slices, folding):
    weight = draw(5, 12, 2, 3)
    assert torch.equal(split(fold(weight, folding, 1)[0], num_slices), fold(weight, folding, num_slices))


@pytest.mark.parametrize(("shape", "expected"), [((2, 3), True), ((3, 3), True), ((4, 3), False), ((7, 1, 5), True)])
def test_wide_means_at_least_as_many_columns_as_rows(shape, expected):
    assert is_wide(torch.zeros(shape)) is expected


@pytest.mark.parametrize("shape", SHAPES + LARGE[:1], ids=str)
def test_scaled_left_vectors_rebuild_every_slice_at_every_rank(shape, crew):
    matrix = draw(*shape)
    for count in slice_counts(shape[1])[:4]:
        slicing = every_slicing(matrix, crew)[count]
        scaled, _ = scaled_left_vectors(slicing, crew)
        left, values, _ = torch.linalg.svd(split(matrix, count), full_matrices=False)
        torch.testing.assert_close(scaled.norm(dim=-1), values, rtol=1e-6, atol=1e-6)
        for rank in {0, 1, slicing.full_rank // 2, slicing.full_rank - 1}:
            rest, expected = scaled[:, rank:], left[..., rank:] * values[:, None, rank:]
            torch.testing.assert_close(rest.mT @ rest, expected @ expected.mT, rtol=1e-8, atol=1e-8)
