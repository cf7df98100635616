"""The knapsack where there is something to say besides the laws: sizes, limits, ties, refusals."""

import random
from math import fsum

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lr_callback.decisions.candidates import Frontier
from lr_callback.decisions.hull import Curve
from lr_callback.decisions.knapsack import _priced, smallest_sum


def network(layers: int, choices: int, seed: int = 0, power: float = 1.0) -> dict[str, Frontier]:
    """Draw layers with errors that fall in a curve of their own, and costs in the millions."""
    draw, edges = random.Random(seed), {}
    for layer in range(layers):
        per_rank, decay = draw.randrange(1000, 9000), draw.uniform(0.3, 2) * power
        costs = sorted(draw.sample(range(1, choices * 2), choices))
        errors = [(1 - cost / choices / 2) ** decay for cost in costs[:-1]]
        edges[f"layer{layer}"] = Frontier([per_rank * cost for cost in costs], [*errors, 0.0], [None] * choices)
    return edges


def budget_at(edges: dict[str, Frontier], share: float) -> int:
    low, high = (sum(edge.costs[end] for edge in edges.values()) for end in (0, -1))
    return low + int(share * (high - low))


def squares(edges: dict[str, Frontier], chosen: dict[str, int]) -> float:
    return fsum(edges[name].errors[index] ** 2 for name, index in chosen.items())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("layers", "choices"), [(20, 400), (54, 200), (1, 3000)])
def test_networks_of_many_layers_and_choices_are_solved_exactly(layers, choices, share):
    edges = network(layers, choices)
    budget = budget_at(edges, share)
    chosen, gap = smallest_sum(edges, budget)
    assert gap == 0
    assert sum(edges[name].costs[index] for name, index in chosen.items()) <= budget
    more_work, _ = smallest_sum(edges, budget, 2**22)
    assert squares(edges, more_work) == pytest.approx(squares(edges, chosen), rel=1e-12)


def test_where_the_work_does_not_do_the_gap_is_told_and_more_work_makes_it_smaller():
    # Equal gains for each unit of cost: nothing but the exact use of the budget tells combinations apart.
    draw = random.Random(1)
    edges = {}
    for name in "abcdefghijklmnopqrst":
        cost = draw.randint(10**6, 2 * 10**6)
        edges[name] = Frontier([1, cost], [((cost - 1) * 1e-6) ** 0.5, 0.0], [None] * 2)
    budget = budget_at(edges, 0.5)
    found = {work: smallest_sum(edges, budget, work) for work in (4, 2**10, 2**22)}
    gaps = [gap for _, gap in found.values()]
    assert gaps[0] > gaps[1] > gaps[2] == 0
    best = squares(edges, found[2**22][0])
    assert all((1 - gap) * squares(edges, chosen) <= best <= squares(edges, chosen) for chosen, gap in found.values())


def test_layers_that_are_all_alike_are_solved_exactly_and_by_name():
    alike = Frontier([1000 * (index + 1) for index in range(50)], [1 - index / 49 for index in range(50)], [None] * 50)
    edges = {f"l{index}": alike for index in range(30)}
    chosen, gap = smallest_sum(edges, 30_000 + 700_000)
    assert gap == 0
    assert sorted(chosen.values()) == [23] * 20 + [24] * 10  # of squares, what is as equal as can be


def test_a_budget_that_all_fits_takes_the_best_of_every_layer():
    edges = network(3, 5)
    high = budget_at(edges, 1)
    assert smallest_sum(edges, high) == smallest_sum(edges, high + 9) == (dict.fromkeys(edges, 4), 0.0)
    assert smallest_sum({}, 0) == ({}, 0.0)
    assert smallest_sum({"only": Frontier([7], [0.3], [None])}, 7) == ({"only": 0}, 0.0)


def test_a_layer_whose_best_error_is_not_zero_counts_with_it():
    one, two = Frontier([1, 5], [3.0, 2.0], [None] * 2), Frontier([1, 5], [2.5, 0.0], [None] * 2)
    assert smallest_sum({"one": one, "two": two}, 6) == ({"one": 0, "two": 1}, 0.0)


def test_of_equal_sums_the_cheaper_is_taken():
    edges = {"dear": Frontier([1, 9], [0.5, 0.0], [None] * 2), "cheap": Frontier([1, 4], [0.5, 0.0], [None] * 2)}
    assert smallest_sum(edges, 10) == ({"dear": 0, "cheap": 1}, 0.0)


def test_steps_of_a_smaller_gain_are_taken_where_they_use_the_budget_better():
    # For each unit of cost `a` gains most, then `b`, then `c`; 10 units are left: b and c together are best.
    edges = {
        "a": Frontier([1, 8], [8.0, 0.0], [None] * 2),
        "b": Frontier([1, 6], [6.5, 0.0], [None] * 2),
        "c": Frontier([1, 6], [6.4, 0.0], [None] * 2),
    }
    assert 8.0**2 / 7 > 6.5**2 / 5 > 6.4**2 / 5
    assert smallest_sum(edges, 13) == ({"a": 0, "b": 1, "c": 1}, 0.0)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_the_size_of_the_errors_does_not_matter(scale):
    edges = network(6, 30)
    scaled = {name: Frontier(e.costs, [scale * x for x in e.errors], e.choices) for name, e in edges.items()}
    assert smallest_sum(scaled, budget_at(edges, 0.4)) == smallest_sum(edges, budget_at(edges, 0.4))


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_nor_does_it_for_a_high_power(scale):
    edges = network(6, 30)
    scaled = {name: Frontier(e.costs, [scale * x for x in e.errors], e.choices) for name, e in edges.items()}
    budget = budget_at(edges, 0.4)
    assert smallest_sum(scaled, budget, power=4) == smallest_sum(edges, budget, power=4)


def test_a_higher_power_spares_the_worst_layer():
    # One unit is left: on the layer with the most squares to save, or on the one with the largest error.
    edges = {
        "worst": Frontier([1, 2], [1.0, 0.9], [None] * 2),
        "other": Frontier([1, 2], [0.7, 0.4], [None] * 2),
    }
    assert smallest_sum(edges, 3) == ({"worst": 0, "other": 1}, 0.0)
    assert smallest_sum(edges, 3, power=4) == ({"worst": 1, "other": 0}, 0.0)


def test_the_number_of_threads_changes_nothing():
    edges, before = network(30, 200), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(smallest_sum(edges, budget_at(edges, 0.3), 2**12))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_budget_below_the_cheapest_choices_is_refused_with_what_is_needed():
    edges = {"one": Frontier([3, 9], [0.5, 0.0], [None] * 2), "two": Frontier([4], [0.0], [None])}
    assert smallest_sum(edges, 7) == ({"one": 0, "two": 0}, 0.0)
    with pytest.raises(ValueError, match="`budget` must be at least 7, the cheapest choices together, got 6"):
        smallest_sum(edges, 6)


class Operations(TorchDispatchMode):
    """Count what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += 1
        return operation(*arguments, **(options or {}))


def test_layers_are_priced_and_thinned_in_as_many_steps_however_many_there_are():
    counted = []
    for layers in (3, 2000):
        curves = {name: Curve(edge.costs, edge.errors) for name, edge in network(layers, 9).items()}
        with Operations() as operations:
            priced = _priced(curves, 1e-5)
            kept = priced.within(1e-2)
        counted.append(operations.count)
        assert [layer.name for layer in kept] == list(curves)
        for layer in kept:
            curve = curves[layer.name]
            charged = [value + 1e-5 * cost for cost, value in zip(curve.costs, curve.values, strict=True)]
            near = [index for index, one in enumerate(charged) if one - min(charged) <= 1e-2]
            assert layer.floor == min(charged) and layer.indices.tolist() == near
            assert layer.costs.tolist() == [curve.costs[index] for index in near]
            assert layer.values.tolist() == [curve.values[index] for index in near]
            assert layer.excess.tolist() == [charged[index] - min(charged) for index in near]
    assert counted[0] == counted[1] < 40
