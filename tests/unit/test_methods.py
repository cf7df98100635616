"""Methods: what they look at, what they choose, what they refuse."""

from itertools import product

import pytest
import torch

from lr_callback.candidates import LayerCandidates, frontier, layer_candidates
from lr_callback.costs import Call, LayerCost
from lr_callback.errors import ERRORS, relative_errors
from lr_callback.folding import FOLDINGS, Geometry, fold
from lr_callback.methods import (
    ALDS,
    ALDSK,
    ALDSError,
    ALDSSimple,
    EnergyThreshold,
    LRank,
    Method,
    SingularValueThreshold,
    UniformRank,
    cost_of,
)

GEOMETRIES = {
    "wide": Geometry(8, 12, (3, 3)),
    "tall": Geometry(24, 6),
    "square": Geometry(12, 12, (1, 1)),
    "grouped": Geometry(16, 24, (3,), groups=2),
}
ONE_SLICE = [UniformRank, SingularValueThreshold, EnergyThreshold, LRank]
RULES = [*ONE_SLICE, ALDSSimple, ALDSError, ALDSK]


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


def pairs(layer: LayerCandidates) -> list[tuple[int, float]]:
    """List cost and error of all that a layer can become."""
    ranks = [(one, rank) for one in layer.candidates for rank in range(1, one.last + 1)]
    return [(layer.dense_cost, 0.0), *((one.cost(rank), one.errors[rank].item()) for one, rank in ranks)]


def cost_at(rule: type[Method], layer: LayerCandidates, number: float) -> int:
    """Return a layer's cost by the rule's own definition at a threshold, a share or a price."""
    if rule is ALDSK:
        paid = [pair for pair in pairs(layer) if pair[0] <= number * layer.dense_cost] or [min(pairs(layer))]
        return min(paid, key=lambda pair: (pair[1], pair[0]))[0]
    if rule is LRank:
        return min(pairs(layer), key=lambda pair: (number * pair[0] + (layer.norm * pair[1]) ** 2, pair[0]))[0]
    (one,) = layer.candidates
    if rule in (UniformRank, ALDSSimple):
        rank = max(1, round(number * one.full_rank))
    else:
        curve = one.errors.square() if rule is EnergyThreshold else one.errors
        rank = next((rank for rank in range(1, one.last + 1) if curve[rank] <= number), one.last + 1)
    return one.cost(rank) if rank <= one.last else layer.dense_cost


def numbers_of(rule: type[Method], layers: dict[str, LayerCandidates]) -> list[float]:
    """Return numbers between which no choice of the rule changes."""
    if rule in (UniformRank, ALDSSimple):
        return [(step + 0.25) / 400 for step in range(400)]
    choices = [pairs(layer) for layer in layers.values()]
    if rule is ALDSK:
        return [0.0, *(cost / layer.dense_cost * (1 + 1e-12) for layer in layers.values() for cost, _ in pairs(layer))]
    if rule is LRank:
        energies = [[(c, (layer.norm * e) ** 2) for c, e in pairs(layer)] for layer in layers.values()]
        slopes = {(v - w) / (d - c) for one in energies for c, v in one for d, w in one if c < d and v > w}
        return [0.0, *(slope * (1 + 1e-9) for slope in slopes)]
    power = 2 if rule is EnergyThreshold else 1
    return [0.0, *({error**power + 1e-12 for one in choices for _, error in one})]


@pytest.mark.parametrize("rule", RULES)
def test_rules_take_the_best_number_that_fits(rule, crew):
    layers = analysed(rule(), crew)
    reachable = {sum(cost_at(rule, one, number) for one in layers.values()) for number in numbers_of(rule, layers)}
    assert len(reachable) > 8
    for budget in budgets(rule(), layers, 20):
        assert total(layers, rule().choose(layers, budget)) == max(cost for cost in reachable if cost <= budget)


@pytest.mark.parametrize("rule", ONE_SLICE)
def test_plain_rules_look_at_one_slice_only(rule, crew):
    layers = analysed(rule(), crew)
    assert {one.num_slices for layer in layers.values() for one in layer.candidates} == {1}


@pytest.mark.parametrize("rule", [ALDSSimple, ALDSError])
def test_rules_of_a_fixed_number_of_slices_take_the_nearest_that_divides_the_channels(rule, crew):
    wanted_of = {1: (1, 1, 1, 1), 3: (3, 3, 3, 3), 5: (6, 6, 6, 6), 8: (6, 6, 6, 6), 99: (12, 6, 12, 12)}
    for asked, wanted in wanted_of.items():
        method = rule(num_slices=asked)
        assert method.num_slices == asked
        assert [method.slice_counts(one) for one in GEOMETRIES.values()] == [[count] for count in wanted]
        found = [{one.num_slices for one in layer.candidates} for layer in analysed(method, crew).values()]
        assert all(own <= {count} for own, count in zip(found, wanted, strict=True)) and any(found)


@pytest.mark.parametrize(("rule", "plain"), [(ALDSSimple, UniformRank), (ALDSError, SingularValueThreshold)])
def test_with_one_slice_the_ablations_are_the_plain_rules(rule, plain, crew):
    layers, plain_layers = analysed(rule(1), crew), analysed(plain(), crew)
    for budget in budgets(plain(), plain_layers):
        ours, theirs = rule(1).choose(layers, budget), plain().choose(plain_layers, budget)
        assert [one and one[1] for one in ours.values()] == [one and one[1] for one in theirs.values()]


def test_l_rank_weighs_the_energies_of_the_weights_as_they_are(crew):
    costs = {name: LayerCost(GEOMETRIES["square"], 4) for name in ("large", "small")}
    weight = torch.randn(GEOMETRIES["square"].weight_shape, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 100.0):
        weights = {"large": scale * weight, "small": weight}
        layers = {name: LRank().candidates(weights[name], cost, crew) for name, cost in costs.items()}
        assert layers["large"].norm == pytest.approx(scale * weight.norm().item(), rel=1e-6)
        choices = LRank().choose(layers, 200)
        ranks = {name: 12 if choice is None else choice[1] for name, choice in choices.items()}
        assert (ranks["large"] > ranks["small"]) == (scale > 1)


def test_alds_k_gives_every_layer_its_best_slices(crew):
    layers = analysed(ALDSK(), crew)
    choices = ALDSK().choose(layers, dense(layers) // 2)
    assert len({choice[0].num_slices for choice in choices.values()}) > 1
    for name, choice in choices.items():
        paid = [error for cost, error in pairs(layers[name]) if cost <= cost_of(layers[name], choice)]
        assert error_of(choice) == min(paid)


@pytest.mark.parametrize("error", ERRORS)
def test_the_sum_is_the_same_whether_errors_are_given_up_or_not(error, crew):
    geometry, method = Geometry(80, 24, (3, 3)), ALDS(error=error, objective="sum")
    whole = ALDS(error=error, objective="sum")
    weights = [torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    cost = LayerCost(geometry)

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


@pytest.mark.parametrize("rule", [ALDS, *RULES])
def test_what_is_reachable_is_known_without_a_weight(rule, crew):
    method = rule()
    priced = {name: method.priced(LayerCost(one, 4)) for name, one in GEOMETRIES.items()}
    layers = analysed(method, crew)
    assert method.smallest_cost(priced) == method.smallest_cost(layers)
    for budget in budgets(method, layers, 3):
        assert total(priced, method.choose(priced, budget)) <= budget


@pytest.mark.parametrize("rule", RULES)
def test_rules_leave_hopeless_layers_dense(rule, crew):
    layers = analysed(rule(), crew)
    hopeless = LayerCandidates(7, ())
    assert rule().choose({**layers, "tiny": hopeless}, dense(layers) + 7)["tiny"] is None
    assert rule().smallest_cost({**layers, "tiny": hopeless}) == rule().smallest_cost(layers) + 7


@pytest.mark.parametrize("rule", [ALDSSimple, ALDSError])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "3"])
def test_a_number_of_slices_that_cannot_be_meant_is_refused(rule, value):
    with pytest.raises(ValueError, match=f"`num_slices` must be a whole number of at least 1, got {value!r}"):
        rule(num_slices=value)


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
        ({"objective": "greedy"}, r"`objective` must be one of \['minimax', 'sum'.*\], got 'greedy'"),
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
