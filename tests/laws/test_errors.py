"""Law 2: a relative error is the named measure of the residual of what is built."""

from dataclasses import dataclass
from math import sqrt

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lr_callback.common.parallel import workers
from lr_callback.mathematics.errors import ERRORS, relative_errors
from lr_callback.mathematics.folding import (
    FOLDINGS,
    Geometry,
    compose,
    fold,
    slice_counts,
    unfold_decoder,
    unfold_encoder,
)
from lr_callback.mathematics.truncation import truncate

RESOLUTION = 1e-6  # a root of an eigenvalue in float64 resolves about 1e-7 of the largest


@dataclass(frozen=True)
class Case:
    """A weight and one way to slice and fold it."""

    weight: torch.Tensor
    folding: str
    num_slices: int

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.weight.shape[0], self.weight.shape[1], tuple(self.weight.shape[2:]))

    @property
    def full_rank(self) -> int:
        return self.geometry.full_rank(self.folding, self.num_slices)


@st.composite
def cases(draw) -> Case:
    """Draw a layer of any shape; some are deficient, have an empty slice, or another scale."""
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 3), (1, 4), (3, 1)]))
    filters, channels = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12, 16]))
    folding, num_slices = draw(st.sampled_from(list(FOLDINGS))), draw(st.sampled_from(slice_counts(channels)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(filters, channels, *kernel, dtype=torch.float64, generator=random)
    if draw(st.booleans()):  # deficient: every filter is a mixture of two
        weight = torch.randn(filters, 2, dtype=torch.float64, generator=random) @ weight[:2].flatten(1).repeat(2, 1)[:2]
        weight = weight.reshape(filters, channels, *kernel)
    if num_slices > 1 and draw(st.booleans()):
        weight[:, : channels // num_slices] = 0
    return Case(weight * 10.0 ** draw(st.integers(-6, 6)), folding, num_slices)


def curve(case: Case, error: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    with workers() as crew:
        matrix = fold(case.weight.to(dtype), case.folding, 1)[0]
        return relative_errors(matrix, error, {case.num_slices: case.full_rank}, crew)[case.num_slices]


def built(case: Case, rank: int) -> torch.Tensor:
    """Return the weight of the two layers that are built at a rank; nothing at all at rank 0."""
    if rank == 0:
        return torch.zeros_like(case.weight)
    with workers() as crew:
        left, right = truncate(fold(case.weight, case.folding, case.num_slices), rank, crew)
    encoder = unfold_encoder(right, case.geometry, case.folding)
    decoder = unfold_decoder(left, case.geometry, case.folding)
    return compose(encoder, decoder, case.num_slices)


def measured(case: Case, error: str, rank: int) -> float:
    residual = case.weight - built(case, rank)
    whole = fold(case.weight, case.folding, 1)[0]
    order = "fro" if error == "frobenius" else 2
    if error in {"slice", "bound"}:
        lost = torch.linalg.matrix_norm(fold(residual, case.folding, case.num_slices), 2).max()
        lost *= sqrt(case.num_slices) if error == "bound" else 1
    else:
        lost = torch.linalg.matrix_norm(fold(residual, case.folding, 1)[0], order)
    return (lost / torch.linalg.matrix_norm(whole, order)).item()


@given(cases(), st.sampled_from(list(ERRORS)), st.floats(0, 1))
def test_the_relative_error_is_the_measure_of_the_residual_that_is_built(case, error, share):
    rank = round(share * case.full_rank)
    assert abs(curve(case, error)[rank].item() - measured(case, error, rank)) <= RESOLUTION


@given(cases())
def test_slice_is_at_most_operator_is_at_most_bound(case):
    by_slice, operator, bound = (curve(case, name) for name in ("slice", "operator", "bound"))
    assert (by_slice <= operator + RESOLUTION).all()
    assert (operator <= bound + RESOLUTION).all()


@given(cases())
def test_slice_is_at_most_operator_is_at_most_bound_in_single_precision(case):
    by_slice, operator, bound = (curve(case, name, torch.float32) for name in ("slice", "operator", "bound"))
    assert (by_slice <= operator + 1e-5).all()
    assert (operator <= bound + 1e-5).all()


@given(cases(), st.sampled_from(list(ERRORS)), st.sampled_from([torch.float32, torch.float64]))
def test_the_error_is_zero_at_full_rank_and_never_rises_before(case, error, dtype):
    falling = curve(case, error, dtype)
    assert falling[-1] == 0
    assert (falling.diff() <= 0).all()
    assert 0 <= falling[0] <= sqrt(case.num_slices) * (1 + 1e-12)


@st.composite
def decaying(draw) -> torch.Tensor:
    """Draw a matrix of any shape whose singular values fall slowly, fast, or all at once."""
    rows, columns = draw(st.integers(2, 100)), 12 * draw(st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    left, _, right = torch.linalg.svd(
        torch.randn(rows, columns, dtype=torch.float64, generator=random), full_matrices=False
    )
    falling = torch.linspace(0, 1, len(right), dtype=torch.float64).mul(-draw(st.sampled_from([0, 1, 4, 20]))).exp()
    return (left * falling) @ right


def dense_curve(matrix: torch.Tensor, num_slices: int, last: int) -> torch.Tensor:
    """Return the operator errors at ranks 0 to ``last``, each from a residual of its own."""
    parts = torch.stack(matrix.chunk(num_slices, dim=1))
    left, values, right = torch.linalg.svd(parts, full_matrices=False)
    lost = [
        torch.cat(list((left[..., rank:] * values[:, None, rank:]) @ right[:, rank:]), dim=1)
        for rank in range(last + 1)
    ]
    return torch.linalg.matrix_norm(torch.stack(lost), 2) / torch.linalg.matrix_norm(matrix, 2)


@settings(max_examples=25)
@given(decaying(), st.sampled_from([torch.float32, torch.float64]))
def test_what_is_given_up_is_no_better_and_no_cheaper_than_another_choice_and_the_rest_is_exact(matrix, dtype):
    matrix, counts = matrix.to(dtype), [1, 2, 3, 4, 6, 12]
    last = {count: min(matrix.shape[0], matrix.shape[1] // count) for count in counts}
    prices = {count: matrix.shape[1] + count * matrix.shape[0] for count in counts}
    with workers() as crew:
        curves = relative_errors(matrix, "operator", last, crew, prices)
    tolerance = 1e-5 if dtype == torch.float32 else RESOLUTION
    exact = {count: dense_curve(matrix.double(), count, rank) for count, rank in last.items()}
    costs = torch.cat([prices[count] * torch.arange(len(curve)) for count, curve in curves.items()])
    found = torch.cat(list(curves.values()))
    for count, curve in curves.items():
        known = curve.isfinite()
        assert (curve - exact[count])[known].abs().max() <= tolerance
        for rank in (~known).nonzero().flatten().tolist():
            assert found[costs <= prices[count] * rank].min() <= exact[count][rank] + tolerance


@given(cases())
def test_full_rank_builds_the_dense_weight(case):
    largest = case.weight.abs().max().item()
    assert (built(case, case.full_rank) - case.weight).abs().max().item() <= 1e-10 * largest


@given(cases(), st.sampled_from(list(ERRORS)), st.integers(-3, 3))
def test_the_error_does_not_depend_on_the_scale_of_the_weight(case, error, exponent):
    scaled = Case(case.weight * 10.0**exponent, case.folding, case.num_slices)
    assert (curve(case, error) - curve(scaled, error)).abs().max().item() <= RESOLUTION
