"""Lanczos against dense eigenvalue decompositions."""

import pytest
import torch

from lr_callback.mathematics.lanczos import Lanczos

BLOCKS, SIZE, COLUMNS = 2, 40, 3


def operators() -> torch.Tensor:
    """Return ``(blocks, columns, n, n)`` positive semidefinite matrices."""
    factors = torch.randn(BLOCKS, COLUMNS, SIZE, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return factors @ factors.mT


def advance(lanczos: Lanczos, matrices: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        lanczos.advance(torch.einsum("bcij,bcj->bci", matrices, lanczos.vectors))


def started(limits: torch.Tensor | None = None) -> Lanczos:
    limits = torch.full((BLOCKS, COLUMNS), torch.inf, dtype=torch.float64) if limits is None else limits
    return Lanczos(SIZE, limits, like=torch.empty(0, dtype=torch.float64))


def test_the_largest_ritz_value_becomes_the_largest_eigenvalue_of_each_column():
    matrices, lanczos = operators(), started()
    everything = torch.ones(BLOCKS, COLUMNS, dtype=torch.bool)
    advance(lanczos, matrices, 5)
    early = lanczos.largest(everything)
    advance(lanczos, matrices, 35)
    exact = torch.linalg.eigvalsh(matrices)[..., -1].flatten()
    torch.testing.assert_close(lanczos.largest(everything), exact, rtol=1e-9, atol=0)
    assert (early < exact).all() and lanczos.steps == 40


@pytest.mark.parametrize("share", [0.9, 0.999, 1.001])
def test_a_column_is_over_as_soon_as_its_ritz_value_reaches_its_limit_and_never_below(share):
    matrices = operators()
    limits = share * torch.linalg.eigvalsh(matrices)[..., -1]
    lanczos, everything = started(limits), torch.ones(BLOCKS, COLUMNS, dtype=torch.bool)
    for _ in range(30):
        advance(lanczos, matrices, 1)
        assert torch.equal(lanczos.over.flatten(), lanczos.largest(everything) >= limits.flatten())
    assert lanczos.over.all() == (share < 1)


def test_an_invariant_subspace_ends_a_column_without_harm():
    matrices, lanczos = torch.eye(SIZE, dtype=torch.float64).repeat(BLOCKS, COLUMNS, 1, 1), started()
    advance(lanczos, matrices, 12)
    values = lanczos.largest(torch.ones(BLOCKS, COLUMNS, dtype=torch.bool))
    torch.testing.assert_close(values, torch.ones(BLOCKS * COLUMNS, dtype=torch.float64))


def test_some_columns_go_on_as_if_the_others_were_there():
    matrices, one, other = operators(), started(), started()
    advance(one, matrices, 6)
    advance(other, matrices, 6)
    one.keep(torch.tensor([1]), torch.tensor([[2, 0]]))
    kept = matrices[1:, [2, 0]]
    advance(one, kept, 6)
    advance(other, matrices, 6)
    values = other.largest(torch.ones(BLOCKS, COLUMNS, dtype=torch.bool)).view(BLOCKS, COLUMNS)
    torch.testing.assert_close(one.largest(torch.ones(1, 2, dtype=torch.bool)), values[1, [2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_start_is_always_the_same_unit_vector(dtype):
    limits = torch.full((1, 2), torch.inf, dtype=torch.float64)
    one, other = (Lanczos(SIZE, limits, like=torch.empty(0, dtype=dtype)) for _ in range(2))
    assert torch.equal(one.vectors, other.vectors) and one.vectors.dtype == dtype
    torch.testing.assert_close(one.vectors.norm(dim=-1), torch.ones(1, 2, dtype=dtype))
