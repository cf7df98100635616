"""Error curves against norms of residual matrices built from torch.linalg.svd in float64."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch

from lr_callback.mathematics.errors import ERRORS, find_measure, relative_errors
from lr_callback.mathematics.folding import slice_counts

Norm = Callable[[torch.Tensor], float]


def operator_norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, 2).item()


def frobenius_norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix).item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def residual(matrix: torch.Tensor, num_slices: int, rank: int) -> list[torch.Tensor]:
    """Return what each slice loses when it is truncated on its own."""
    lost = []
    for part in matrix.double().chunk(num_slices, dim=1):
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        lost.append((left[:, rank:] * values[rank:]) @ right[rank:])
    return lost


def error_by_definition(matrix: torch.Tensor, error: str, num_slices: int, rank: int) -> float:
    lost = residual(matrix, num_slices, rank)
    if error == "frobenius":
        return frobenius_norm(torch.cat(lost, dim=1)) / frobenius_norm(matrix.double())
    whole = operator_norm(matrix.double())
    worst_slice = max(operator_norm(part) for part in lost) / whole
    return {
        "slice": worst_slice,
        "bound": sqrt(num_slices) * worst_slice,
        "operator": operator_norm(torch.cat(lost, dim=1)) / whole,
    }[error]


def every_rank(shape: tuple[int, int]) -> dict[int, int]:
    return {count: min(shape[0], shape[1] // count) for count in slice_counts(shape[1])}


SHAPES = [(1, 1), (1, 7), (7, 1), (3, 12), (24, 6), (6, 24), (12, 12), (5, 11), (16, 48)]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slicing_and_rank_has_the_error_of_its_residual(shape, error, crew):
    matrix = draw(*shape)
    last = every_rank(shape)
    curves = relative_errors(matrix, error, last, crew)
    assert curves.keys() == last.keys()
    for count, curve in curves.items():
        expected = [error_by_definition(matrix, error, count, rank) for rank in range(last[count] + 1)]
        assert curve.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert curve.dtype == torch.float64 and curve.device.type == "cpu"
        assert curve[-1] == 0 and (curve.diff() <= 0).all()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (40, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_error_is_that_of_the_stored_weight_in_every_dtype(dtype, shape, error, crew):
    matrix = draw(*shape).to(dtype)
    for count, curve in relative_errors(matrix, error, every_rank(shape), crew).items():
        expected = [error_by_definition(matrix, error, count, rank) for rank in range(len(curve))]
        assert curve.tolist() == pytest.approx(expected, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("error", ERRORS)
def test_the_largest_rank_of_interest_cuts_the_curve_and_changes_no_value(error, crew):
    matrix = draw(10, 24)
    whole = relative_errors(matrix, error, every_rank((10, 24)), crew)
    part = relative_errors(matrix, error, {2: 3, 3: 0, 8: 1}, crew)
    assert {count: len(curve) for count, curve in part.items()} == {2: 4, 3: 1, 8: 2}
    for count, curve in part.items():
        assert curve.tolist() == pytest.approx(whole[count][: len(curve)].tolist(), rel=1e-9)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", [(9, 16), (16, 8), (8, 16)], ids=str)
def test_a_deficient_layer_has_no_error_beyond_its_rank(shape, error, crew):
    matrix = draw(shape[0], 2) @ draw(2, shape[1], seed=1)
    for count, curve in relative_errors(matrix, error, every_rank(shape), crew).items():
        expected = [error_by_definition(matrix, error, count, rank) for rank in range(len(curve))]
        assert curve.tolist() == pytest.approx(expected, abs=1e-6)
        assert curve[2:].tolist() == pytest.approx([0.0] * (len(curve) - 2), abs=1e-6)


@pytest.mark.parametrize("error", ERRORS)
def test_an_empty_slice_adds_no_error(error, crew):
    matrix = draw(6, 16)
    matrix[:, 4:8] = 0
    curve = relative_errors(matrix, error, {4: 4}, crew)[4]
    expected = [error_by_definition(matrix, error, 4, rank) for rank in range(5)]
    assert curve.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e8, 1e25])
@pytest.mark.parametrize("rows", [12, 80])
def test_the_error_does_not_depend_on_the_scale_of_the_weight(rows, scale, error, crew):
    matrix = draw(rows, 24 * 4).float()
    plain = relative_errors(matrix, error, {4: 6}, crew)[4]
    scaled = relative_errors(matrix * scale, error, {4: 6}, crew)[4]
    assert scaled.tolist() == pytest.approx(plain.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 24), (24, 12), (16, 48)], ids=str)
def test_unsliced_slice_operator_and_bound_are_the_same(shape, crew):
    curves = [relative_errors(draw(*shape), name, {1: min(shape)}, crew)[1] for name in ("slice", "operator", "bound")]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(curves[2], curves[0], rtol=1e-7, atol=1e-8)


def test_keeping_nothing_of_the_unsliced_layer_is_an_error_of_one(crew):
    for error in ERRORS:
        assert relative_errors(draw(5, 9), error, {1: 5}, crew)[1][0].item() == 1.0


def test_slices_with_the_same_columns_meet_the_bound(crew):
    column = draw(8, 1)
    matrix = column.repeat(1, 4) + 1e-3 * draw(8, 4, seed=1)  # four slices of one column, almost parallel
    curves = {name: relative_errors(matrix, name, {4: 1}, crew)[4][0].item() for name in ERRORS}
    assert curves["operator"] == pytest.approx(1, abs=1e-2)
    assert curves["slice"] == pytest.approx(0.5, abs=1e-2)
    assert curves["bound"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("error", ERRORS)
def test_the_weight_is_not_changed(error, crew):
    matrix = draw(12, 6).float()
    before = matrix.clone()
    relative_errors(matrix, error, {1: 6, 2: 3}, crew)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", [(6, 24), (24, 12), (80, 96), (30, 150), (257, 262), (257, 771)], ids=str)
def test_with_prices_an_error_is_given_up_only_where_another_slicing_is_as_good_for_as_little(shape, error, crew):
    matrix, last = draw(*shape), every_rank(shape)
    prices = {count: shape[1] + count * shape[0] for count in last}
    whole = relative_errors(matrix, error, last, crew)
    saved = relative_errors(matrix, error, last, crew, prices)
    points = [(k, prices[k] * rank, whole[k][rank].item()) for k in last for rank in range(1, last[k] + 1)]
    for count, curve in saved.items():
        for rank in range(1, last[count] + 1):
            cost, exact = prices[count] * rank, whole[count][rank].item()
            if curve[rank].isinf():
                better = (k for k, paid, known in points if paid <= cost and known <= exact + 1e-9)
                assert any(k != count for k in better)
            else:
                assert curve[rank].item() == pytest.approx(exact, rel=1e-6, abs=1e-9)


# Seeds and shapes with a rank whose value stands still for a few Lanczos steps and then rises again.
@pytest.mark.parametrize(("rows", "columns", "seed"), [(96, 864, 0), (192, 768, 0)])
def test_a_value_that_stands_still_for_a_while_is_not_taken_for_the_largest(rows, columns, seed, crew):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns)
    last = {count: min(rows, columns // count) * 3 // 4 for count in (2, 3, 6)}
    exact = relative_errors(matrix.double(), "operator", last, crew)
    for count, curve in relative_errors(matrix, "operator", last, crew).items():
        torch.testing.assert_close(curve, exact[count], rtol=2e-6, atol=0)


def test_an_unknown_measure_is_refused_with_the_known_ones(crew):
    message = r"`error` must be one of \['slice', 'operator', 'bound', 'frobenius', 'activation', .*\], got 'spectral'"
    with pytest.raises(ValueError, match=message):
        relative_errors(draw(2, 2), "spectral", {1: 1}, crew)
    with pytest.raises(ValueError, match=message):
        find_measure("spectral")


@pytest.mark.parametrize("error", ERRORS)
def test_a_measure_is_found_by_its_name(error):
    assert find_measure(error) is ERRORS[error]


@pytest.mark.parametrize("shape", [(3, 6, 8), (2, 80, 96), (2, 96, 20)], ids=str)
@pytest.mark.parametrize("error", ERRORS)
def test_the_error_of_groups_is_that_of_the_matrix_with_them_on_its_diagonal(shape, error, crew):
    groups = draw(*shape).float() * torch.tensor([1.0, 2.0, 3.0])[: shape[0], None, None]
    last, order = every_rank(shape[1:]), "fro" if error == "frobenius" else 2
    norms = torch.linalg.matrix_norm(groups.double(), order)
    together = relative_errors(groups, error, last, crew)
    apart = [relative_errors(one, error, last, crew) for one in groups]
    for count in last:
        absolute = torch.stack([curves[count] * norm for curves, norm in zip(apart, norms, strict=True)])
        whole = absolute.norm(dim=0) / norms.norm() if error == "frobenius" else absolute.amax(0) / norms.max()
        assert torch.allclose(together[count], whole, rtol=1e-5, atol=1e-7)


def test_what_is_given_up_of_groups_is_beaten_by_another_number_of_slices(crew):
    groups = draw(2, 80, 96).float()
    last, prices = every_rank((80, 96)), {count: 96 + count * 80 for count in slice_counts(96)}
    known, all_of_them = (relative_errors(groups, "operator", last, crew, given) for given in (prices, None))
    given_up = 0
    for count, curve in known.items():
        assert torch.allclose(curve[curve.isfinite()], all_of_them[count][curve.isfinite()], rtol=1e-5)
        for rank in curve.isinf().nonzero().flatten().tolist():
            given_up += 1
            cheaper = [(other, rank * prices[count] // prices[other]) for other in last]
            best = min(all_of_them[other][min(r, last[other])].item() for other, r in cheaper)
            assert best <= all_of_them[count][rank].item() * (1 + 1e-6)
    assert given_up
