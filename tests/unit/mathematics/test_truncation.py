"""Factors against torch.linalg.svd in float64 of each slice."""

import pytest
import torch

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.truncation import leading_vectors, truncate


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def deficient(slices: int, rows: int, columns: int, rank: int) -> torch.Tensor:
    return draw(slices, rows, rank) @ draw(slices, rank, columns, seed=1)


def with_values(*values: float, seed: int = 0) -> torch.Tensor:
    """Return ``(1, n, n)``: a symmetric matrix of these eigenvalues, in a random basis."""
    basis = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    return (basis * torch.tensor(values, dtype=torch.float64) @ basis.mT)[None]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 4, 9), (3, 9, 4), (2, 6, 6), (12, 5, 1), (1, 300, 1200), (5, 90, 100)], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_truncation_leaves_exactly_what_the_svd_leaves(share, shape, crew):
    slices = draw(*shape)
    full = min(shape[1:])
    rank = max(1, round(share * full))
    left, right = truncate(slices, rank, crew)
    assert left.shape == (shape[0], shape[1], rank) and right.shape == (shape[0], rank, shape[2])
    values = torch.linalg.svdvals(slices)
    residual = slices - left @ right
    largest = torch.nn.functional.pad(values, (0, 1))[:, rank]
    torch.testing.assert_close(torch.linalg.matrix_norm(residual, 2), largest, rtol=1e-9, atol=1e-10)
    tail = values[:, rank:].square().sum(-1).sqrt()
    torch.testing.assert_close(torch.linalg.matrix_norm(residual), tail, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 6, 6)], ids=str)
def test_the_scale_is_shared_evenly_between_both_factors(shape, crew):
    slices = draw(*shape)
    left, right = truncate(slices, 3, crew)
    values = torch.diag_embed(torch.linalg.svdvals(slices)[:, :3])
    torch.testing.assert_close(left.mT @ left, values)
    torch.testing.assert_close(right @ right.mT, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float64_whatever_the_weight_is(dtype, crew):
    slices = draw(2, 4, 6).to(dtype)
    left, right = truncate(slices, 4, crew)
    assert (left.dtype, right.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(left @ right, slices.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 8, 5)], ids=str)
def test_a_deficient_slice_is_rebuilt_at_full_rank_with_a_factor_that_can_still_train(shape, crew):
    slices = deficient(*shape, rank=2)
    slices[1] = 0
    left, right = truncate(slices, 5, crew)
    torch.testing.assert_close(left @ right, slices, rtol=1e-10, atol=1e-10)
    # A product of two zeros has no gradient: for each rank one of the two factors must not vanish.
    assert (torch.maximum(left.norm(dim=-2), right.norm(dim=-1)) > 1e-6).all()
    assert left.isfinite().all() and right.isfinite().all()


def first_vector_left_over(gram: torch.Tensor) -> torch.Tensor:
    """Return what the first vector of each Gram matrix leaves of it, as an operator norm."""
    first = leading_vectors(gram, 1)
    assert first.shape == (*gram.shape[:2], 1)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(len(gram), 1, dtype=torch.float64))
    kept = first @ first.mT
    return torch.linalg.matrix_norm(gram - kept @ gram @ kept, 2)


@pytest.mark.parametrize("rest", [0.0, 1e-3, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-13, 1.0])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_first_vector_leaves_the_second_eigenvalue_however_near_it_is(rest, copies):
    gram = with_values(1.0, *[rest] * copies, *torch.linspace(0.3, 0, 60).tolist())
    left_over = first_vector_left_over(gram)
    assert left_over.item() == pytest.approx(torch.linalg.eigvalsh(gram)[0, -2].item(), rel=1e-9, abs=1e-10)


def test_first_vectors_of_unlike_matrices_are_found_side_by_side():
    gram = torch.cat([with_values(*draw(80, seed=seed).square().tolist(), seed=seed) for seed in range(4)])
    gram[1], gram[2] = torch.eye(80), 0  # all the same, and nothing at all
    left_over, values = first_vector_left_over(gram), torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(left_over, values[:, -2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-140, 1e-40, 1e40, 1e140])
def test_the_first_vector_is_exact_at_any_scale(scale):
    values = draw(70).square().tolist()
    torch.testing.assert_close(
        leading_vectors(with_values(*values) * scale, 1), leading_vectors(with_values(*values), 1)
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_leading_vectors_do_not_read_what_is_above_the_diagonal(rank):
    gram = with_values(*draw(70).square().tolist())
    spoilt = gram.tril() + torch.full_like(gram, torch.nan).triu(1)
    torch.testing.assert_close(leading_vectors(spoilt, rank), leading_vectors(gram.tril(), rank), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 40])
@pytest.mark.parametrize("shape", [(2, 300, 1200), (6, 500, 90)], ids=str)
def test_factors_have_the_same_bits_on_any_number_of_workers(shape, rank, crew):
    slices = draw(*shape)
    for several, alone in zip(truncate(slices, rank, crew), truncate(slices, rank, Workers(None)), strict=True):
        assert torch.equal(several, alone)
