"""Residual norms against the operator norms of residual matrices that are built one by one."""

import pytest
import torch

from lr_callback.mathematics.residual import residual_norms


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scaled_vectors(slices: torch.Tensor) -> torch.Tensor:
    left, values, _ = torch.linalg.svd(slices, full_matrices=False)
    return (left * values.unsqueeze(-2)).mT


def norms_one_by_one(slices: torch.Tensor, last: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    norms = []
    for rank in range(last + 1):
        parts = (left[..., rank:] * values[:, None, rank:]) @ right[:, rank:]
        norms.append(torch.linalg.matrix_norm(torch.cat(list(parts), dim=1), 2))
    return torch.stack(norms)


def almost_equal_slices(rank: int, num_slices: int, gap: float) -> torch.Tensor:
    """Draw slices with orthogonal column spaces, whose singular values differ by a small gap from each other."""
    basis = torch.linalg.qr(draw(rank * num_slices, rank * num_slices)).Q
    decay = torch.linspace(1, 0.3, rank, dtype=torch.float64)
    slices = []
    for index in range(num_slices):
        right = torch.linalg.qr(draw(2 * rank, 2 * rank, seed=index + 1)).Q[:rank]
        left = basis[:, index * rank : (index + 1) * rank]
        slices.append(left * (decay * (1 - gap * index)) @ right)
    return torch.stack(slices)


# k, rows, columns of a slice: wide, tall, square, one column, more slices than rows, more ranks than one task takes
SHAPES = [(2, 3, 9), (4, 9, 3), (3, 6, 6), (12, 8, 1), (48, 5, 2), (7, 2, 11), (2, 80, 90), (3, 150, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_has_the_norm_of_its_residual(shape, crew):
    slices = draw(*shape)
    last = min(shape[1:])
    norms = residual_norms(scaled_vectors(slices), last, crew)
    assert norms.dtype == torch.float64 and norms.shape == (last + 1,)
    torch.testing.assert_close(norms, norms_one_by_one(slices, last), rtol=1e-7, atol=1e-9)
    assert norms[-1] == 0


@pytest.mark.parametrize("last", [0, 1, 3, 4])
def test_the_largest_rank_of_interest_cuts_the_curve_and_changes_no_value(last, crew):
    slices = draw(3, 4, 9)
    norms = residual_norms(scaled_vectors(slices), last, crew)
    torch.testing.assert_close(norms, norms_one_by_one(slices, last), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 1, 3), (5, 1, 1)], ids=str)
def test_a_layer_with_one_row_has_its_norm(shape, crew):
    slices = draw(*shape)
    norms = residual_norms(scaled_vectors(slices), 1, crew)
    torch.testing.assert_close(norms, norms_one_by_one(slices, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [6, 24])
@pytest.mark.parametrize("gap", [0.0, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-7)], ids=str)
def test_eigenvalues_that_almost_coincide_are_told_apart_well_enough(dtype, tolerance, gap, rank, crew):
    slices = almost_equal_slices(rank, num_slices=4, gap=gap)
    norms = residual_norms(scaled_vectors(slices).to(dtype), rank - 1, crew)
    torch.testing.assert_close(norms, norms_one_by_one(slices, rank - 1), rtol=tolerance, atol=1e-6)


def test_a_slice_that_outweighs_all_others_sets_the_norm(crew):
    slices = draw(4, 6, 10)
    slices[2] *= 1e4
    norms = residual_norms(scaled_vectors(slices), 6, crew)
    torch.testing.assert_close(norms, norms_one_by_one(slices, 6), rtol=1e-7, atol=1e-6)


def test_deficient_and_empty_slices_leave_nothing_beyond_their_rank(crew):
    slices = draw(3, 8, 2) @ draw(3, 2, 9, seed=1)
    slices[0] = 0
    norms = residual_norms(scaled_vectors(slices), 8, crew)
    torch.testing.assert_close(norms[:2], norms_one_by_one(slices, 1), rtol=1e-7, atol=0)
    assert norms[2:].max() <= 1e-7 * norms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_never_rise_with_rank(dtype, crew):
    norms = residual_norms(scaled_vectors(draw(6, 30, 40)).to(dtype), 30, crew)
    assert (norms.diff() <= 0).all()


def test_the_given_vectors_are_not_changed(crew):
    scaled = scaled_vectors(draw(3, 6, 6))
    before = scaled.clone()
    residual_norms(scaled, 6, crew)
    assert torch.equal(scaled, before)


def test_two_calls_give_the_same_bits(crew):
    scaled = scaled_vectors(draw(4, 70, 75)).float()
    assert torch.equal(residual_norms(scaled, 69, crew), residual_norms(scaled, 69, crew))


# wide, tall, more slices than a quarter of the rows (each rank has its own matrix), blocks that overlap, dense ones
@pytest.mark.parametrize("shape", [(2, 80, 90), (4, 150, 40), (40, 100, 6), (3, 70, 75), (4, 20, 24)], ids=str)
@pytest.mark.parametrize("share", [0.97, 0.999, 1.001, 1.03])
def test_with_a_limit_exactly_the_norms_that_reach_it_are_given_up(shape, share, crew):
    slices = draw(*shape)
    last = min(shape[1:]) - 1
    exact = norms_one_by_one(slices, last)
    limit = exact * torch.where(torch.arange(last + 1) % 3 == 0, share, 2 - share)
    norms = residual_norms(scaled_vectors(slices), last, crew, limit)
    assert torch.equal(norms.isinf(), exact >= limit)
    torch.testing.assert_close(norms[norms.isfinite()], exact[norms.isfinite()], rtol=1e-7, atol=0)


def test_where_every_norm_reaches_its_limit_nothing_is_left(crew):
    slices = draw(4, 90, 100)
    norms = residual_norms(scaled_vectors(slices), 80, crew, 0.5 * norms_one_by_one(slices, 80))
    assert norms.isinf().all()


@pytest.mark.parametrize("last", [1, 2])
def test_where_only_rank_0_is_given_up_before_the_first_step_the_others_are_exact(last, crew):
    slices = draw(2, 80, 90)
    limit = torch.tensor([0.0, torch.inf, torch.inf], dtype=torch.float64)[: last + 1]
    norms = residual_norms(scaled_vectors(slices), last, crew, limit)
    assert norms[0].isinf()
    torch.testing.assert_close(norms[1:], norms_one_by_one(slices, last)[1:], rtol=1e-7, atol=1e-9)
