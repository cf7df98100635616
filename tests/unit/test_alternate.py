"""Alternate: the map that outputs should come from learns what inputs explain, and not the rows."""

import pytest
import torch

from lr_callback.alternate import Seen
from lr_callback.regression import ridge_solve

INPUTS, OUTPUTS = 40, 6


def seen(rows, explained, seed):
    """Return moments of rows in which a map of the inputs explains a part of what the dense map lacks."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    weight, missing, inputs = draw(OUTPUTS, INPUTS), draw(OUTPUTS, INPUTS) / INPUTS**0.5, draw(rows, INPUTS)
    lacks = explained * inputs @ missing.T + draw(rows, OUTPUTS)
    both = torch.cat([inputs, lacks, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    return Seen(both.T @ both / rows, weight, True, rows), weight + explained * missing


def off(seen, wanted):
    """Return how far off the map is, that of a regression without a correction, and the dense one."""
    squares, found = seen.solve()
    full = seen.weight + ridge_solve(squares, seen.centered[INPUTS:, :INPUTS])
    return [(one - wanted).norm().item() for one in (found, full, seen.weight)]


def means(rows, explained):
    """Return the means over some draws: single ones may be anything."""
    return torch.tensor([off(*seen(rows, explained, seed)) for seed in range(20)]).mean(0).tolist()


@pytest.mark.parametrize("rows", [80, 100, 400])
def test_where_inputs_explain_nothing_it_stays_close_to_the_dense_map(rows):
    found, full, dense = means(rows, explained=0.0)
    assert dense == 0 and found < 0.3 * full


@pytest.mark.parametrize("rows", [100, 400, 20000])
def test_where_they_explain_a_half_it_is_closer_than_either(rows):
    found, full, dense = means(rows, explained=1.0)
    assert found < full * (1 + 1e-6) and found < dense


def test_of_many_rows_it_is_the_regression():
    found, full, dense = means(20000, explained=1.0)
    assert found < 0.1 * dense and found == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("rows", [1, 2, 40, 79])
def test_of_less_than_two_rows_for_each_input_it_is_the_dense_map(rows):
    moments, _ = seen(rows, 1.0, seed=0)
    assert torch.equal(moments.solve()[1], moments.weight)
