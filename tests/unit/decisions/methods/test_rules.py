"""Rules that ALDS is compared with: what they look at, what they choose, what they refuse."""

from itertools import product
from math import log, prod

import pytest
import torch
from torch import nn

from lr_callback import allocate, collect_moments, factorize_
from lr_callback.decisions.candidates import Candidate, LayerCandidates
from lr_callback.decisions.costs import CountedCost
from lr_callback.decisions.methods import (
    ALDS,
    ALDSK,
    PCA,
    ALDSError,
    ALDSSimple,
    EnergyThreshold,
    LRank,
    Method,
    SingularValueThreshold,
    UniformRank,
    cost_of,
)
from tests.unit.decisions.methods.drawn import GEOMETRIES, analysed, budgets, dense, error_of, pairs, total

ONE_SLICE = [UniformRank, SingularValueThreshold, EnergyThreshold, LRank, PCA]
RULES = [*ONE_SLICE, ALDSSimple, ALDSError, ALDSK]


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
    """Return a layer's cost by the rule's own definition at a threshold, a share or a price."""
    if rule is ALDSK:
        paid = [pair for pair in pairs(layer) if pair[0] <= number * layer.dense_cost] or [min(pairs(layer))]
        return min(paid, key=lambda pair: (pair[1], pair[0]))[0]
    if rule in (LRank, PCA):
        return min(pairs(layer), key=lambda pair: (number * pair[0] + lost(rule, layer, pair[1]), pair[0]))[0]
    (one,) = layer.candidates
    if rule in (UniformRank, ALDSSimple):
        rank = max(1, round(number * one.full_rank))
    else:
        curve = one.errors.square() if rule is EnergyThreshold else one.errors
        rank = next((rank for rank in range(1, one.last + 1) if curve[rank] <= number), one.last + 1)
    return one.cost(rank) if rank <= one.last else layer.dense_cost


def lost(rule: type[Method], layer: LayerCandidates, error: float) -> float:
    return (layer.norm * error) ** 2 if rule is LRank else -log(1 - error**2)


def numbers_of(rule: type[Method], layers: dict[str, LayerCandidates]) -> list[float]:
    """Return numbers between which no choice of the rule changes."""
    if rule in (UniformRank, ALDSSimple):
        return [(step + 0.25) / 400 for step in range(400)]
    choices = [pairs(layer) for layer in layers.values()]
    if rule is ALDSK:
        return [0.0, *(cost / layer.dense_cost * (1 + 1e-12) for layer in layers.values() for cost, _ in pairs(layer))]
    if rule in (LRank, PCA):
        energies = [[(c, lost(rule, layer, e)) for c, e in pairs(layer)] for layer in layers.values()]
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
    costs = {name: CountedCost(GEOMETRIES["square"], 4) for name in ("large", "small")}
    weight = torch.randn(GEOMETRIES["square"].weight_shape, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 100.0):
        weights = {"large": scale * weight, "small": weight}
        layers = {name: LRank().candidates(weights[name], cost, crew) for name, cost in costs.items()}
        assert layers["large"].norm == pytest.approx(scale * weight.norm().item(), rel=1e-6)
        choices = LRank().choose(layers, 200)
        ranks = {name: 12 if choice is None else choice[1] for name, choice in choices.items()}
        assert (ranks["large"] > ranks["small"]) == (scale > 1)


def energies_kept(errors) -> float:
    return prod(1 - error**2 for error in errors)


def test_pca_keeps_the_largest_product_of_energies_at_what_it_costs(crew):
    layers = {name: layer for name, layer in analysed(PCA(), crew).items() if name != "grouped"}
    others = [
        (sum(c for c, _ in one), energies_kept(e for _, e in one)) for one in product(*map(pairs, layers.values()))
    ]
    for budget in budgets(PCA(), layers, 10):
        choices = PCA().choose(layers, budget)
        ours = energies_kept(map(error_of, choices.values()))
        assert ours >= max(kept for cost, kept in others if cost <= total(layers, choices)) * (1 - 1e-9)


def test_pca_drops_what_the_source_drops_first():
    """Of layers of one cost a rank: over and over the component with the smallest share of what is left."""
    spectra = {"0": [8.0, 4.0, 2.0, 1.0, 0.5, 0.1], "1": [9.0, 0.4, 0.2, 0.15, 0.1, 0.05]}
    layers = {}
    for name, values in spectra.items():
        energies = torch.tensor([*values, 0.0], dtype=torch.float64)
        errors = (energies.flip(0).cumsum(0).flip(0) / energies.sum()).sqrt()
        layers[name] = LayerCandidates(70, (Candidate("kernel_in_encoder", 1, 6, errors, 10 * torch.arange(7)),))
    left = {name: list(values) for name, values in spectra.items()}
    while any(len(values) > 1 for values in left.values()):
        chosen = PCA().choose(layers, 10 * sum(map(len, left.values())))
        assert {name: choice[1] for name, choice in chosen.items()} == {name: len(one) for name, one in left.items()}
        longer = [name for name, values in left.items() if len(values) > 1]
        left[min(longer, key=lambda name: left[name][-1] / sum(left[name]))].pop()


def test_pca_builds_the_principal_components_of_the_outputs():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 24, bias=False)), torch.randn(64, 16) * torch.arange(1, 17)
    outputs = model(inputs).detach().double()
    moments = collect_moments(model, [inputs])
    allocation = allocate(model, 0.7, method=PCA(), importance=moments)
    rank = allocation.layers["0"].rank
    assert rank > 1
    factorize_(model, allocation, importance=moments)
    vectors = torch.linalg.eigh(outputs.T @ outputs).eigenvectors[:, -rank:]
    torch.testing.assert_close(model(inputs).double(), outputs @ vectors @ vectors.T, rtol=1e-3, atol=1e-3)
    share = allocation.layers["0"].relative_error ** 2
    lost_energy = (outputs - outputs @ vectors @ vectors.T).square().sum() / outputs.square().sum()
    assert share == pytest.approx(lost_energy.item(), rel=1e-5)


def test_pca_refuses_to_choose_without_activations():
    with pytest.raises(ValueError, match=r"error='activation' is weighted: `importance` must be .*collect_moments"):
        allocate(nn.Sequential(nn.Linear(16, 24)), 0.5, method=PCA())


def test_alds_k_gives_every_layer_its_best_slices(crew):
    layers = analysed(ALDSK(), crew)
    choices = ALDSK().choose(layers, dense(layers) // 2)
    assert len({choice[0].num_slices for choice in choices.values()}) > 1
    for name, choice in choices.items():
        paid = [error for cost, error in pairs(layers[name]) if cost <= cost_of(layers[name], choice)]
        assert error_of(choice) == min(paid)


@pytest.mark.parametrize("rule", [ALDS, *RULES])
def test_what_is_reachable_is_known_without_a_weight(rule, crew):
    method = rule()
    priced = {name: method.priced(CountedCost(one, 4)) for name, one in GEOMETRIES.items()}
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
