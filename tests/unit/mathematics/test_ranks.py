"""Effective and stable ranks are those of the singular values of the whole matrix."""

import math

import pytest
import torch

from lr_callback.mathematics.ranks import effective_rank, stable_rank

SHAPES = [(1, 5, 9), (1, 200, 90), (1, 70, 300), (4, 80, 90), (3, 20, 100), (1, 1, 1)]


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def spectrum(matrices):
    return torch.linalg.svdvals(torch.block_diag(*matrices).double()).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_rank_is_the_frobenius_norm_over_the_operator_norm_squared(shape):
    matrices, values = drawn(shape), spectrum(drawn(shape))
    exact = sum(one**2 for one in values) / max(values) ** 2
    assert stable_rank(matrices).item() == pytest.approx(exact, rel=1e-12)
    assert stable_rank(matrices, steps=64).item() == pytest.approx(exact, rel=1e-3)
    assert stable_rank(matrices, steps=64) == stable_rank(matrices, steps=64), "the same bits each time"


@pytest.mark.parametrize("shape", SHAPES)
def test_effective_rank_is_the_exponential_of_the_entropy(shape):
    values = spectrum(drawn(shape))
    shares = [one / sum(values) for one in values if one > 1e-12 * max(values)]
    exact = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(drawn(shape)).item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_of_equal_singular_values_both_are_their_number(rank):
    left, _ = torch.linalg.qr(drawn((100, rank)).double())
    matrix = (1e-5 * left @ left.T)[None]
    for found in (effective_rank(matrix), stable_rank(matrix), stable_rank(matrix, steps=64)):
        assert found.item() == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize("size", [1e200, 1.0, 1e-165, 1e-300])
def test_neither_depends_on_the_size_of_the_entries(size):
    matrix = size * torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))[None]
    assert stable_rank(matrix).item() == pytest.approx(1.5) == stable_rank(matrix, steps=64).item()
    assert effective_rank(matrix).item() == pytest.approx(2 * 2**0.5)
    small = 1e-30 * torch.eye(90)[None]
    assert stable_rank(small).item() == pytest.approx(90) == stable_rank(small, steps=64).item()


@pytest.mark.parametrize("rank_of", [effective_rank, stable_rank, lambda matrices: stable_rank(matrices, 64)])
def test_of_what_has_none(rank_of):
    assert rank_of(torch.zeros(1, 3, 4)) == 0 == rank_of(torch.zeros(1, 0, 4)) == rank_of(torch.zeros(0, 3, 4))
    assert rank_of(torch.ones(1, 100, 200)).item() == pytest.approx(1, rel=1e-5)
    for bad in (torch.nan, torch.inf):
        assert rank_of(torch.full((1, 70, 80), bad)).isnan()


@pytest.mark.parametrize("rank_of", [effective_rank, stable_rank])
def test_gradients_are_those_of_differences(rank_of):
    matrices = drawn((2, 3, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(rank_of, matrices)
    deficient = torch.diag(torch.tensor([2.0, 1.0, 0.0])).requires_grad_()
    (slope,) = torch.autograd.grad(rank_of(deficient[None]), deficient)
    assert slope.isfinite().all()
