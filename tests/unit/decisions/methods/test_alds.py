"""ALDS, and what every method looks at."""

from itertools import product

import pytest
import torch

from lr_callback.decisions.candidates import LayerCandidates, frontier, layer_candidates
from lr_callback.decisions.costs import Call, CountedCost
from lr_callback.decisions.methods import (
    ALDS,
    cost_of,
)
from lr_callback.mathematics.errors import ERRORS, relative_errors
from lr_callback.mathematics.folding import FOLDINGS, Geometry, fold
from tests.unit.decisions.methods.drawn import GEOMETRIES, analysed, budgets, error_of, total, weights


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_candidates_carry_the_error_curves_of_the_weight(name, error, crew):
    method, weight = ALDS(error=error, foldings=list(FOLDINGS)), weights()[name]
    layer = method.candidates(weight, CountedCost(GEOMETRIES[name]), crew)
    assert layer.candidates
    for one in layer.candidates:
        matrix = fold(weight, one.folding, 1, GEOMETRIES[name].groups)
        curve = relative_errors(matrix, error, {one.num_slices: one.last}, crew)[one.num_slices]
        known = one.errors.isfinite()  # what another candidate beats needs no error
        assert one.errors[known].tolist() == pytest.approx(curve[known].tolist(), rel=1e-5, abs=1e-6)
        assert known.all() or error == "operator"


@pytest.mark.parametrize("calls", [None, (Call(2, (8, 8), (4, 4)),)], ids=["parameters", "multiply_adds"])
def test_priced_lists_the_same_candidates_at_the_same_costs_without_a_weight(calls, crew):
    method, cost = ALDS(foldings=list(FOLDINGS), max_slices=6), CountedCost(GEOMETRIES["wide"], 4, calls)
    looked, priced = method.candidates(weights()["wide"], cost, crew), method.priced(cost)
    assert looked.dense_cost == priced.dense_cost

    def forms(layer):
        return [(one.folding, one.num_slices, one.full_rank, one.last, one.cost(1)) for one in layer.candidates]

    assert forms(looked) == forms(priced)
    assert method.smallest_cost({"one": looked}) == method.smallest_cost({"one": priced})


@pytest.mark.parametrize("error", ERRORS)
def test_alds_finds_the_smallest_worst_error_among_all_thresholds(error, crew):
    method = ALDS(error=error, foldings=list(FOLDINGS))
    layers = analysed(method, crew)

    def cheapest(layer: LayerCandidates, threshold: float) -> int:
        costs = [one.cost(r) for one in layer.candidates for r in range(1, one.last + 1) if one.errors[r] <= threshold]
        return min([layer.dense_cost, *costs])

    curves = [one.errors for layer in layers.values() for one in layer.candidates]
    thresholds = {0.0, *(error for curve in curves for error in curve.tolist())}
    needed = {threshold: sum(cheapest(layer, threshold) for layer in layers.values()) for threshold in thresholds}
    for budget in budgets(method, layers, 6):
        choices = method.choose(layers, budget)
        assert total(layers, choices) <= budget
        best = min(threshold for threshold, cost in needed.items() if cost <= budget)
        assert max(map(error_of, choices.values())) == best


def test_alds_keeps_the_width_a_multiple_of_what_is_asked(crew):
    method = ALDS(rank_multiple=4)
    layers = analysed(method, crew)
    factorized = [choice for budget in budgets(method, layers) for choice in method.choose(layers, budget).values()]
    widths = [choice[0].num_slices * choice[1] for choice in factorized if choice is not None]
    assert widths and all(width % 4 == 0 for width in widths)


@pytest.mark.parametrize("rank_multiple", [1, 4, 8])
@pytest.mark.parametrize("error", ERRORS)
def test_errors_that_are_given_up_change_no_choice(error, rank_multiple, crew):
    method, geometry = ALDS(error=error, rank_multiple=rank_multiple), Geometry(80, 24, (3, 3))
    weight, cost = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(5)), CountedCost(geometry)
    curves = layer_candidates(
        cost,
        method.foldings,
        method.slice_counts(geometry),
        lambda name, last: relative_errors(fold(weight, name, 1)[0], error, last, crew),
    )
    wanted = frontier(curves, rank_multiple)
    found = frontier(method.candidates(weight, cost, crew), rank_multiple)
    assert found.costs == wanted.costs
    assert found.errors == pytest.approx(wanted.errors, rel=1e-6)
    assert method.smallest_cost({"one": method.priced(cost)}) == found.costs[0]


def test_alds_keeps_to_its_number_of_slices(crew):
    layers = analysed(ALDS(max_slices=3), crew)
    assert {one.num_slices for one in layers["wide"].candidates} == {1, 2, 3}


@pytest.mark.parametrize("error", ERRORS)
def test_the_sum_is_the_same_whether_errors_are_given_up_or_not(error, crew):
    geometry, method = Geometry(80, 24, (3, 3)), ALDS(error=error, objective="sum")
    whole = ALDS(error=error, objective="sum")
    weights = [torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    cost = CountedCost(geometry)

    def all_errors(weight: torch.Tensor) -> LayerCandidates:
        matrix = fold(weight, "kernel_in_encoder", 1)[0]
        return layer_candidates(
            cost, whole.foldings, geometry.slice_counts(), lambda _, last: relative_errors(matrix, error, last, crew)
        )

    given_up = {str(i): method.candidates(weight, cost, crew) for i, weight in enumerate(weights)}
    layers = {str(i): all_errors(weight) for i, weight in enumerate(weights)}
    for budget in budgets(method, layers, 5):
        sums = [sum(error_of(c) ** 2 for c in method.choose(one, budget).values()) for one in (given_up, layers)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("power", [1, 2, 4])
def test_the_sum_to_a_power_is_below_that_of_other_powers(power, crew):
    layers = analysed(ALDS("frobenius"), crew)
    for budget in budgets(ALDS(), layers, 5):
        sums = {
            one: sum(
                error_of(choice) ** power
                for choice in ALDS("frobenius", "sum", power=one).choose(layers, budget).values()
            )
            for one in (1, 2, 4)
        }
        assert sums[power] <= min(sums.values()) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": "l2"}, r"`error` must be one of \['slice', 'operator', .*\], got 'l2'"),
        ({"objective": "greedy"}, r"`objective` must be one of \['minimax', 'sum', 'loss'\], got 'greedy'"),
        ({"foldings": ["kernel_in_encoder", "flat"]}, r"`folding` must be one of .*, got 'flat'"),
        ({"foldings": []}, r"`foldings` must be a non-empty list of names, got \[\]"),
        ({"foldings": "kernel_in_encoder"}, r"`foldings` must be a non-empty list of names, got 'kernel_in_encoder'"),
        ({"max_slices": 0}, "`max_slices` must be a whole number of at least 1, got 0"),
        (
            {"slices": [4, 8], "max_slices": 2},
            r"must have a number up to `max_slices`, got \[4, 8\] and 2",
        ),
        ({"max_slices": 2.0}, "`max_slices` must be a whole number of at least 1, got 2.0"),
        ({"rank_multiple": -1}, "`rank_multiple` must be a whole number of at least 1, got -1"),
        ({"rank_multiple": "8"}, "`rank_multiple` must be a whole number of at least 1, got '8'"),
        ({"objective": "sum", "power": 0.5}, "`power` must be a number of at least 1, got 0.5"),
        ({"objective": "sum", "power": float("inf")}, "`power` must be a number of at least 1, got inf"),
        ({"objective": "sum", "power": float("nan")}, "`power` must be a number of at least 1, got nan"),
        ({"objective": "sum", "power": "4"}, "`power` must be a number of at least 1, got '4'"),
        ({"objective": "sum", "power": True}, "`power` must be a number of at least 1, got True"),
        ({"error": "activation", "shrinkage": 1.5}, "`shrinkage` must be a number from 0 to 1, got 1.5"),
        ({"error": "activation", "shrinkage": True}, "`shrinkage` must be a number from 0 to 1, got True"),
        ({"error": "activation", "shrinkage": float("nan")}, "`shrinkage` must be a number from 0 to 1, got nan"),
        ({"shrinkage": 0.5}, "`shrinkage` is of the moments of the inputs.*got 0.5 with error='slice'"),
        ({"power": 4}, "`power` is of the errors in a sum, and objective='minimax' adds none up.*got 4"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ALDS(**arguments)


def test_cost_of_a_choice_is_that_of_its_rank_and_of_none_the_dense_cost(crew):
    layers = analysed(ALDS(), crew)
    for (name, layer), rank in product(layers.items(), (1, 2)):
        first, cost = layer.candidates[0], CountedCost(GEOMETRIES[name], 4)
        assert cost_of(layer, None) == cost.dense
        assert cost_of(layer, (first, rank)) == cost.factorized(first.folding, first.num_slices, rank)
