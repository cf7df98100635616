"""Measured errors are norms of the folded residual over that of the folded weight, slow and one by one."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr_callback.mathematics.errors import ERRORS
from lr_callback.mathematics.folding import FOLDINGS, fold
from lr_callback.mathematics.measured import MEASURED, measured_error


def slow(dense, other, error, folding, num_slices, groups):
    """Return the error of the whole matrix, the groups on its diagonal, by singular value decompositions."""

    def norm(weight, count):
        parts = fold(weight, folding, count, groups)
        if error == "frobenius":
            return sum(float(one) ** 2 for one in weight.flatten()) ** 0.5
        worst = max(float(torch.linalg.svdvals(part)[0]) for part in parts)
        return worst * sqrt(count) if error == "bound" else worst

    return norm(dense - other, num_slices if error in ("slice", "bound") else 1) / norm(dense, 1)


@given(
    st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]),
    st.integers(1, 3),
    st.sampled_from([(1, 4), (2, 6), (3, 2)]),
    st.sampled_from(list(MEASURED)),
    st.sampled_from(list(FOLDINGS)),
    st.integers(0, 99),
)
def test_it_is_the_slow_one(kernel, groups, sizes, error, folding, seed):
    filters, channels = sizes
    random = torch.Generator().manual_seed(seed)
    dense, other = (torch.randn(groups * filters, channels, *kernel, generator=random).double() for _ in range(2))
    for num_slices in (1, 2, channels):
        case = (dense, other, error, folding, num_slices, groups)
        assert measured_error(*case).item() == pytest.approx(slow(*case), rel=1e-9)


def test_measures_are_those_that_are_foreseen():
    assert list(MEASURED) == list(ERRORS)


@pytest.mark.parametrize("error", MEASURED)
def test_of_what_is_the_same_of_nothing_and_of_no_number(error):
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    rest = (error, "kernel_in_encoder", 1)
    assert measured_error(dense, dense, *rest) == 0
    assert measured_error(dense, torch.zeros_like(dense), *rest).item() == pytest.approx(1)
    assert measured_error(dense, torch.full_like(dense, torch.nan), *rest).isnan()
    assert torch.autograd.gradcheck(lambda other: measured_error(dense, other, *rest), (2 * dense).requires_grad_())
