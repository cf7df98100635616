"""Methods: what they look at, what they choose, what they refuse."""

from itertools import product

import pytest
import torch

from lr_callback.candidates import LayerCandidates, frontier, layer_candidates
from lr_callback.costs import Call, LayerCost
from lr_callback.errors import ERRORS, relative_errors
from lr_callback.folding import FOLDINGS, Geometry, fold
from lr_callback.methods import ALDS, EnergyThreshold, Method, SingularValueThreshold, UniformRank, cost_of

GEOMETRIES = {
    "wide": Geometry(8, 12, (3, 3)),
    "tall": Geometry(24, 6),
    "square": Geometry(12, 12, (1, 1)),
    "grouped": Geometry(16, 24, (3,), groups=2),
}
RULES = [UniformRank, SingularValueThreshold, EnergyThreshold]


def weights() -> dict[str, torch.Tensor]:
    """Draw weights whose singular values fall at different speeds."""
    drawn = {}
    for seed, (name, geometry) in enumerate(GEOMETRIES.items()):
        weight = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(seed))
        decay = torch.arange(1, geometry.out_channels + 1) ** -(0.4 * (seed + 1))
        drawn[name] = weight * decay.view(-1, *[1] * (weight.dim() - 1))
    return drawn


def analysed(method: Method, crew) -> dict[str, LayerCandidates]:
    return {name: method.candidates(one, LayerCost(GEOMETRIES[name], 4), crew) for name, one in weights().items()}


def total(layers, choices) -> int:
    return sum(cost_of(layers[name], choice) for name, choice in choices.items())


def error_of(choice) -> float:
    return 0.0 if choice is None else choice[0].errors[choice[1]].item()


def dense(layers) -> int:
    return sum(layer.dense_cost for layer in layers.values())


def budgets(method: Method, layers, count: int = 12) -> list[int]:
    low, high = method.smallest_cost(layers), dense(layers)
    return [low + (high - low) * step // count for step in range(count + 1)]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_candidates_carry_the_error_curves_of_the_weight(name, error, crew):
    method, weight = ALDS(error=error, foldings=list(FOLDINGS)), weights()[name]
    layer = method.candidates(weight, LayerCost(GEOMETRIES[name]), crew)
    assert layer.candidates
    for one in layer.candidates:
        matrix = fold(weight, one.folding, 1, GEOMETRIES[name].groups)
        curve = relative_errors(matrix, error, {one.num_slices: one.last}, crew)[one.num_slices]
        known = one.errors.isfinite()  # what another candidate beats needs no error
        assert one.errors[known].tolist() == pytest.approx(curve[known].tolist(), rel=1e-5, abs=1e-6)
        assert known.all() or error == "operator"


@pytest.mark.parametrize("calls", [None, (Call(2, (8, 8), (4, 4)),)], ids=["parameters", "multiply_adds"])
def test_priced_lists_the_same_candidates_at_the_same_costs_without_a_weight(calls, crew):
    method, cost = ALDS(foldings=list(FOLDINGS), max_slices=6), LayerCost(GEOMETRIES["wide"], 4, calls)
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
    weight, cost = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(5)), LayerCost(geometry)
    curves = layer_candidates(
        cost,
        method.foldings,
        geometry.slice_counts(),
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


@pytest.mark.parametrize("rule", [ALDS, *RULES])
def test_the_smallest_cost_can_be_met_and_one_less_is_refused(rule, crew):
    method = rule()
    layers = analysed(method, crew)
    smallest = method.smallest_cost(layers)
    assert total(layers, method.choose(layers, smallest)) == smallest
    with pytest.raises(ValueError, match=rf"`budget` must be at least {smallest}\b.*got {smallest - 1}\."):
        method.choose(layers, smallest - 1)


@pytest.mark.parametrize("rule", [ALDS, *RULES])
def test_with_the_dense_budget_every_layer_keeps_all_it_has(rule, crew):
    layers = analysed(rule(), crew)
    assert set(rule().choose(layers, dense(layers)).values()) == {None}


@pytest.mark.parametrize("rule", RULES)
def test_scalar_rules_never_pass_the_budget_and_use_more_of_a_larger_one(rule, crew):
    layers = analysed(rule(), crew)
    totals = [(budget, total(layers, rule().choose(layers, budget))) for budget in budgets(rule(), layers, 40)]
    assert all(cost <= budget for budget, cost in totals)
    costs = [cost for _, cost in totals]
    assert costs == sorted(costs) and len(set(costs)) > 3


def cost_at(rule: type[Method], layer: LayerCandidates, number: float) -> int:
    """Return a layer's cost by the rule's own definition at a threshold, or at a share for UniformRank."""
    (one,) = layer.candidates
    if rule is UniformRank:
        rank = max(1, round(number * one.full_rank))
    else:
        curve = one.errors if rule is SingularValueThreshold else one.errors.square()
        rank = next((rank for rank in range(1, one.last + 1) if curve[rank] <= number), one.last + 1)
    return one.cost(rank) if rank <= one.last else layer.dense_cost


@pytest.mark.parametrize("rule", RULES)
def test_scalar_rules_take_the_best_number_that_fits(rule, crew):
    layers = analysed(rule(), crew)
    if rule is UniformRank:
        numbers = [(step + 0.25) / 400 for step in range(400)]
    else:
        power = 1 if rule is SingularValueThreshold else 2
        curves = [one.errors for layer in layers.values() for one in layer.candidates]
        errors = {e**power for curve in curves for e in curve.tolist()}
        numbers = [0.0, *(number + 1e-12 for number in errors)]
    reachable = [sum(cost_at(rule, layer, number) for layer in layers.values()) for number in numbers]
    for budget in budgets(rule(), layers, 20):
        assert total(layers, rule().choose(layers, budget)) == max(cost for cost in reachable if cost <= budget)


@pytest.mark.parametrize("rule", RULES)
def test_scalar_rules_look_at_one_slice_only_and_leave_hopeless_layers_dense(rule, crew):
    layers = analysed(rule(), crew)
    assert {one.num_slices for layer in layers.values() for one in layer.candidates} == {1}
    hopeless = LayerCandidates(7, ())
    assert rule().choose({**layers, "tiny": hopeless}, dense(layers) + 7)["tiny"] is None
    assert rule().smallest_cost({**layers, "tiny": hopeless}) == rule().smallest_cost(layers) + 7


@pytest.mark.parametrize("rule", [ALDS, *RULES])
def test_the_written_form_and_the_repr_name_the_method_and_make_it_again(rule):
    written = rule().to_dict()
    assert written.pop("name") == rule.__name__
    assert written["foldings"] == ["kernel_in_encoder"]
    assert repr(rule()).startswith(f"{rule.__name__}(")
    if rule is ALDS:
        asked = ALDS(error="bound", foldings=["width_in_decoder"], max_slices=4, rank_multiple=8)
        arguments = asked.to_dict()
        assert arguments.pop("name") == "ALDS"
        assert vars(ALDS(**arguments)) == vars(asked)
        assert vars(eval(repr(asked), {"ALDS": ALDS})) == vars(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": "l2"}, r"`error` must be one of \['slice', 'operator', .*\], got 'l2'"),
        ({"objective": "greedy"}, r"`objective` must be one of \['minimax'.*\], got 'greedy'"),
        ({"foldings": ["kernel_in_encoder", "flat"]}, r"`folding` must be one of .*, got 'flat'"),
        ({"foldings": []}, r"`foldings` must be a non-empty list of names, got \[\]"),
        ({"foldings": "kernel_in_encoder"}, r"`foldings` must be a non-empty list of names, got 'kernel_in_encoder'"),
        ({"max_slices": 0}, "`max_slices` must be a whole number of at least 1, got 0"),
        ({"max_slices": 2.0}, "`max_slices` must be a whole number of at least 1, got 2.0"),
        ({"rank_multiple": -1}, "`rank_multiple` must be a whole number of at least 1, got -1"),
        ({"rank_multiple": "8"}, "`rank_multiple` must be a whole number of at least 1, got '8'"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ALDS(**arguments)


def test_cost_of_a_choice_is_that_of_its_rank_and_of_none_the_dense_cost(crew):
    layers = analysed(ALDS(), crew)
    for layer, rank in product(layers.values(), (1, 2)):
        first = layer.candidates[0]
        assert cost_of(layer, None) == layer.dense_cost
        assert cost_of(layer, (first, rank)) == first.fixed + rank * first.per_rank
