"""Minimax against every combination of choices."""

import random
from itertools import pairwise, product

import pytest

from lr_callback.decisions.candidates import Frontier
from lr_callback.decisions.minimax import minimax

Frontiers = dict[str, Frontier]


def random_frontiers(seed: int, distinct: bool = True) -> Frontiers:
    """Draw one to four layers of one to five choices; without `distinct`, errors of few values that often coincide."""
    draw = random.Random(seed)
    edges = {}
    for name in "abcd"[: draw.randint(1, 4)]:
        count = draw.randint(1, 5)
        costs = sorted(draw.sample(range(1, 40), count))
        values = [draw.random() for _ in range(count - 1)] if distinct else draw.sample([0.2, 0.4, 0.6, 0.8], count - 1)
        edges[name] = Frontier(costs, [*sorted(values, reverse=True), 0.0], [None] * count)
    return edges


def budgets(edges: Frontiers, seed: int) -> list[int]:
    low, high = sum(edge.costs[0] for edge in edges.values()), sum(edge.costs[-1] for edge in edges.values())
    return [low, high, high + 5, *(random.Random(seed).randint(low, high) for _ in range(4))]


def cost(edges: Frontiers, chosen: dict[str, int]) -> int:
    return sum(edges[name].costs[index] for name, index in chosen.items())


def errors(edges: Frontiers, chosen: dict[str, int]) -> list[float]:
    """Return the errors of all layers, largest first: leximin compares these."""
    return sorted((edges[name].errors[index] for name, index in chosen.items()), reverse=True)


def every_fitting(edges: Frontiers, budget: int) -> list[dict[str, int]]:
    combinations = product(*(range(len(edge.costs)) for edge in edges.values()))
    listed = [dict(zip(edges, indices, strict=True)) for indices in combinations]
    return [chosen for chosen in listed if cost(edges, chosen) <= budget]


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_the_worst_error_is_the_smallest_of_all_combinations(seed, distinct):
    edges = random_frontiers(seed, distinct)
    for budget in budgets(edges, seed):
        chosen = minimax(edges, budget)
        assert cost(edges, chosen) <= budget
        best = min(errors(edges, other)[0] for other in every_fitting(edges, budget))
        assert errors(edges, chosen)[0] == best


@pytest.mark.parametrize("seed", range(40))
def test_with_distinct_errors_all_errors_together_are_the_leximin_ones(seed):
    edges = random_frontiers(seed)
    for budget in budgets(edges, seed):
        best = min(errors(edges, other) for other in every_fitting(edges, budget))
        assert errors(edges, minimax(edges, budget)) == best


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_certificate_the_cheapest_choices_with_a_smaller_worst_error_do_not_fit(seed, distinct):
    edges = random_frontiers(seed, distinct)
    for budget in budgets(edges, seed):
        worst = errors(edges, minimax(edges, budget))[0]
        if worst == 0:
            continue
        cheapest = {
            name: next(index for index, error in enumerate(edge.errors) if error < worst)
            for name, edge in edges.items()
        }
        assert cost(edges, cheapest) > budget


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_better_fits_in_what_is_left_of_the_budget(seed, distinct):
    edges = random_frontiers(seed, distinct)
    for budget in budgets(edges, seed):
        chosen = minimax(edges, budget)
        for name, index in chosen.items():
            if index + 1 < len(edges[name].costs):
                assert cost(edges, {**chosen, name: index + 1}) > budget


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_layers_does_not_matter(seed, distinct):
    edges = random_frontiers(seed, distinct)
    turned = dict(reversed(edges.items()))
    for budget in budgets(edges, seed):
        assert minimax(edges, budget) == minimax(turned, budget)


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_a_larger_budget_never_gives_a_larger_worst_error(seed, distinct):
    edges = random_frontiers(seed, distinct)
    low, high = sum(edge.costs[0] for edge in edges.values()), sum(edge.costs[-1] for edge in edges.values())
    worst = [errors(edges, minimax(edges, budget))[0] for budget in range(low, high + 1)]
    assert all(later <= earlier for earlier, later in pairwise(worst))
    assert worst[-1] == 0


def test_of_two_equal_errors_the_cheaper_step_is_taken_first():
    dear, cheap = Frontier([1, 9], [0.5, 0.0], [None] * 2), Frontier([1, 4], [0.5, 0.0], [None] * 2)
    assert minimax({"dear": dear, "cheap": cheap}, budget=9) == {"dear": 0, "cheap": 1}
    assert minimax({"a": dear, "b": cheap}, budget=9) == {"a": 0, "b": 1}


def test_what_is_left_goes_to_the_next_worst_layer_that_it_can_pay_for():
    edges = {
        "worst": Frontier([1, 100], [0.9, 0.0], [None] * 2),
        "next": Frontier([1, 3, 50], [0.8, 0.3, 0.0], [None] * 3),
        "last": Frontier([1, 2], [0.1, 0.0], [None] * 2),
    }
    assert minimax(edges, budget=6) == {"worst": 0, "next": 1, "last": 1}


def test_a_layer_with_one_choice_keeps_it():
    only = Frontier([7], [0.0], [None])
    assert minimax({"only": only}, budget=7) == {"only": 0}
    assert minimax({}, budget=0) == {}


def test_a_budget_below_the_cheapest_choices_is_refused_with_what_is_needed():
    edges = {"one": Frontier([3, 9], [0.5, 0.0], [None] * 2), "two": Frontier([4], [0.0], [None])}
    assert minimax(edges, budget=7) == {"one": 0, "two": 0}
    with pytest.raises(ValueError, match="`budget` must be at least 7, the cheapest choices together, got 6"):
        minimax(edges, budget=6)
