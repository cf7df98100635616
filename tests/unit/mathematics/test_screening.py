"""Screening against the largest eigenvalues of matrices that are built one by one."""

import pytest
import torch

from lr_callback.common.parallel import workers
from lr_callback.mathematics.screening import screen

RANKS, SLICES, SIZE = 40, 5, 60


def by_rank(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return ``(ranks, k, n)``, what each rank adds falling slowly."""
    drawn = torch.randn(RANKS, SLICES, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (drawn * torch.linspace(1, 0.2, RANKS, dtype=torch.float64)[:, None, None]).to(dtype)


def exact(kept: torch.Tensor) -> torch.Tensor:
    tails = [kept[rank:].flatten(0, 1).double() for rank in range(RANKS)]
    return torch.stack([torch.linalg.matrix_norm(rows, 2).square() for rows in tails])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_limits_that_are_reached_are_found(share, dtype, crew):
    limits = share * exact(by_rank(dtype))
    left = screen(by_rank(dtype), limits, crew)
    assert ((left == 0) | (left == limits)).all()
    assert (left == 0).sum() >= (RANKS if share < 0.95 else RANKS // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1 + 1e-6, 1.01, 2, torch.inf])
def test_no_limit_above_the_norm_is_taken_for_reached(share, dtype, crew):
    limits = share * exact(by_rank(dtype))
    assert torch.equal(screen(by_rank(dtype), limits, crew), limits)


def test_what_is_asked_of_no_rank_stays_so_and_few_ranks_are_enough(crew):
    limits = 0.5 * exact(by_rank())
    limits[1:] = 0
    assert not screen(by_rank(), limits, crew).any()
    assert not screen(by_rank(), torch.zeros(3, dtype=torch.float64), crew).any()


def test_the_limits_of_the_first_ranks_are_enough(crew):
    limits = 0.5 * exact(by_rank())[:7]
    assert not screen(by_rank(), limits, crew).any()


def test_the_number_of_workers_changes_nothing():
    limits, found = torch.linspace(0.9, 1.1, RANKS, dtype=torch.float64) * exact(by_rank()), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with workers() as crew:
            found.append(screen(by_rank(torch.float32), limits, crew))
    torch.set_num_threads(before)
    assert torch.equal(*found) and 0 < int((found[0] == 0).sum()) < RANKS
