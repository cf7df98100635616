"""Alternate: the map that outputs should come from learns what inputs explain, and not the rows."""

import pytest
import torch

from lr_callback.mathematics.alternate import Seen, _mean, alternate
from lr_callback.mathematics.regression import ridge_solve

INPUTS, OUTPUTS = 40, 6


def seen(images, explained, seed, repeats=1):
    """Return moments of rows in which a map of the inputs explains a part of what the dense map lacks.

    Each image gives the same row several times, as the positions of an upsampled map do.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    weight, missing, inputs = draw(OUTPUTS, INPUTS), draw(OUTPUTS, INPUTS) / INPUTS**0.5, draw(images, INPUTS)
    lacks = explained * inputs @ missing.T + draw(images, OUTPUTS)
    rows = torch.cat([inputs, lacks, torch.ones(images, 1, dtype=torch.float64)], dim=1).repeat_interleave(repeats, 0)
    halves = rows[: images // 2 * repeats], rows[images // 2 * repeats :]
    both, *own = (one.T @ one / len(one) for one in (rows, *halves))
    return Seen(both, weight, True, tuple(own)), weight + explained * missing


def off(seen, wanted):
    """Return how far off the map is, that of a regression without a correction, and the dense one."""
    centered = seen.centered
    full = seen.weight + ridge_solve(centered[:INPUTS, :INPUTS], centered[INPUTS:, :INPUTS])
    found = _mean(seen.learned(), seen.weight)
    return [(one - wanted).norm().item() for one in (found, full, seen.weight)]


def means(images, explained, repeats=1):
    """Return the means over some draws: single ones may be anything."""
    return torch.tensor([off(*seen(images, explained, seed, repeats)) for seed in range(20)]).mean(0).tolist()


@pytest.mark.parametrize("repeats", [1, 64])
@pytest.mark.parametrize("images", [4, 45, 60, 100, 400])
def test_where_inputs_explain_nothing_it_stays_close_to_the_dense_map(images, repeats):
    found, full, dense = means(images, 0.0, repeats)
    assert dense == 0 and found < 0.35 * full


@pytest.mark.parametrize("repeats", [1, 64])
@pytest.mark.parametrize("images", [100, 400, 20000])
def test_where_they_explain_a_half_it_is_closer_than_either(images, repeats):
    found, full, dense = means(images, 1.0, repeats if images < 20000 else 1)
    assert found < full * 1.1 and found < dense


def test_of_many_images_it_is_the_regression():
    found, full, dense = means(20000, 1.0)
    assert found < 0.1 * dense and found == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("images", [2, 40, 45, 60, 80, 90])
def test_of_hardly_more_images_than_inputs_it_is_not_far_worse_than_the_dense_map(images):
    found, full, dense = means(images, 1.0, repeats=64)
    assert found < 1.1 * dense and found < full * 1.1


def test_without_halves_it_is_the_dense_map():
    moments, _ = seen(400, 1.0, seed=0)
    for halves in ((), moments.halves[:1]):
        alone = Seen(moments.both, moments.weight, True, halves)
        assert alone.learned() == [] and torch.equal(_mean([], alone.weight), alone.weight)


def factors(weight, slices, rank):
    """Return the truncated factors of each slice."""
    parts = [torch.linalg.svd(part, full_matrices=False) for part in weight.chunk(slices, dim=1)]
    left = torch.stack([one.U[:, :rank] * one.S[:rank] for one in parts])
    return left, torch.stack([one.Vh[:rank] for one in parts])


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("images", [40, 80, 400, 4000])
def test_what_few_images_show_makes_it_no_worse_on_others(images, slices):
    """Means over draws: with the factors that were found, the error on new rows is hardly above that of a new mean."""
    found = torch.zeros(2)
    for seed in range(20):
        moments, wanted = seen(images, 0.5, seed, repeats=16)
        left, right = factors(moments.weight, slices, 2)
        made, former = alternate(moments, left, right, check=True), torch.cat(list(left @ right), dim=1)
        built = torch.cat(list(made.left @ made.right), dim=1)
        found += torch.stack([(built - wanted).square().sum(), (former - wanted).square().sum()])
    assert found[0] < 1.02 * found[1]
    if images == 4000:
        assert found[0] < found[1]


def test_the_error_that_is_told_is_that_of_the_rows():
    moments, _ = seen(50, 1.0, seed=3)
    left, right = factors(moments.weight, 2, 3)
    made = alternate(moments, left, right)
    off = moments.weight - torch.cat(list(made.left @ made.right), dim=1)
    random = torch.Generator().manual_seed(3)
    draws = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((6, 40), (6, 40), (50, 40))]
    inputs, missing = draws[2], draws[1] / INPUTS**0.5
    lacks = inputs @ missing.T + torch.randn(50, OUTPUTS, generator=random, dtype=torch.float64)
    errors = inputs @ off.T + lacks - made.shift
    assert made.after == pytest.approx(errors.square().sum(1).mean().item())
    assert made.after < made.before
