"""Moments: sums that are right as they stream, in any dtype, and over processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr_callback.mathematics.moments import SecondMoments
from lr_callback.metrics.functional import second_moments


@given(st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 99))
def test_they_are_those_of_all_rows_at_once(groups, size, counts, seed):
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(groups, count, size, dtype=torch.float64, generator=random) for count in counts]
    full, squares = SecondMoments(size, groups), SecondMoments(size, groups, diagonal=True)
    for part in parts:
        full.update(part)
        squares.update(part)
    rows = torch.cat(parts, dim=1)
    if not rows.shape[1]:
        return
    wanted = rows.mT @ rows / rows.shape[1]
    assert torch.allclose(full.compute().reshape(groups, size, size), wanted)
    assert torch.allclose(squares.compute().reshape(groups, size), wanted.diagonal(dim1=1, dim2=2))


def test_many_updates_of_half_precision_do_not_drift():
    metric = SecondMoments(1)
    for _ in range(2000):
        metric.update(torch.full((1, 1, 1), 0.1, dtype=torch.bfloat16))
    assert metric.compute().item() == pytest.approx(torch.tensor(0.1, dtype=torch.bfloat16).item() ** 2, rel=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_bad_rows_are_refused_and_nothing_is_added(diagonal):
    metric = SecondMoments(3, 2, diagonal)
    for rows, text in (
        (torch.zeros(2, 5, 4), r"must have the shape \(2, n, 3\), got \(2, 5, 4\)"),
        (torch.zeros(5, 3), r"must have the shape \(2, n, 3\), got \(5, 3\)"),
        (torch.full((2, 1, 3), torch.nan), "must be finite"),
    ):
        with pytest.raises(ValueError, match=f"SecondMoments: `rows` {text}"):
            metric.update(rows)
    assert metric.count == 0 and not metric.total.any()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1.0, 2.0, 3.0]], "an object of the type list"),
        (torch.zeros(1, 2, 3, dtype=torch.complex64), "one of torch.complex64"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "one of torch.int64"),
    ],
)
def test_what_are_no_rows_is_refused(rows, text):
    metric = SecondMoments(3)
    for function in (metric.update, second_moments):
        with pytest.raises(
            TypeError, match=f"SecondMoments: `rows` must be a tensor of a floating dtype, got {text}; con"
        ):
            function(rows)
    assert metric.count == 0


@pytest.mark.parametrize("value", [0, -1, 2.5, "a", True])
def test_sizes_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=f"SecondMoments: `size` must be a whole number of at least 1, got {value!r}"):
        SecondMoments(value)
    with pytest.raises(
        ValueError, match=f"SecondMoments: `groups` must be a whole number of at least 1, got {value!r}"
    ):
        SecondMoments(3, value)


def test_processes_are_added_up():
    """Merge the states of two, as a sum over processes does."""
    one, other, both = SecondMoments(3), SecondMoments(3), SecondMoments(3)
    rows = torch.randn(1, 9, 3)
    one.update(rows[:, :4])
    other.update(rows[:, 4:])
    both.update(rows)
    one.merge_state(other)
    assert torch.allclose(one.total / one.count, both.compute())


def test_products_are_exact_under_autocast():
    rows = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)) + 10
    one, other = SecondMoments(4), SecondMoments(4)
    one.update(rows)
    with torch.autocast("cpu", torch.bfloat16):
        other.update(rows)
    assert torch.equal(one.compute(), other.compute())
