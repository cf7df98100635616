"""Law 3 for the sum of the errors to a power: it is the smallest there is, or no further above it than its gap says."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from math import fsum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.decisions.candidates import Candidate, Frontier, LayerCandidates
from lr_callback.decisions.knapsack import smallest_sum
from lr_callback.decisions.methods import cost_of
from lr_callback.decisions.minimax import minimax

Frontiers = dict[str, Frontier]
# Few values, so that sums often coincide; many; and weighted ones, far above 1.
ERRORS = (st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.floats(0.01, 1.4), st.floats(1e-6, 1e6))


@st.composite
def frontiers(draw, most_layers: int = 5, most_choices: int = 5) -> Frontiers:
    errors, edges = draw(st.sampled_from(ERRORS)), {}
    for name in "abcdefgh"[: draw(st.integers(1, most_layers))]:
        falling = sorted(draw(st.sets(errors, max_size=most_choices - 1)), reverse=True)
        costs = draw(st.sets(st.integers(1, 60), min_size=len(falling) + 1, max_size=len(falling) + 1))
        edges[name] = Frontier(sorted(costs), [*falling, 0.0], [None] * len(costs))
    return edges


@st.composite
def problems(draw, **sizes: int) -> tuple[Frontiers, int]:
    edges = draw(frontiers(**sizes))
    return edges, draw(st.integers(least(edges), sum(edge.costs[-1] for edge in edges.values())))


def least(edges: Frontiers) -> int:
    return sum(edge.costs[0] for edge in edges.values())


def cost(edges: Frontiers, chosen: dict[str, int]) -> int:
    return sum(edges[name].costs[index] for name, index in chosen.items())


def squares(edges: Frontiers, chosen: dict[str, int]) -> float:
    return fsum(edges[name].errors[index] ** 2 for name, index in chosen.items())


def powers(edges: Frontiers, chosen: dict[str, int], power: float) -> float:
    return fsum(edges[name].errors[index] ** power for name, index in chosen.items())


def candidates(edge: Frontier, weight: float) -> LayerCandidates:
    """Return candidates, one of each rank, with the choices of a frontier."""
    made = []
    for cost, error in list(zip(edge.costs, edge.errors, strict=True))[:-1]:
        errors = torch.tensor([9e9, error], dtype=torch.float64)
        made.append(Candidate("kernel_in_encoder", 1, 1, errors, torch.tensor([0, cost])))
    return LayerCandidates(edge.costs[-1], tuple(made), weight=weight)


def optimum(edges: Frontiers, budget: int, power: float = 2) -> float:
    """Search every combination."""
    listed = product(*(zip(edge.costs, edge.errors, strict=True) for edge in edges.values()))
    return min(fsum(e**power for _, e in one) for one in listed if sum(c for c, _ in one) <= budget)


@given(problems())
def test_the_sum_is_the_smallest_of_all_combinations(problem):
    edges, budget = problem
    chosen, gap = smallest_sum(edges, budget)
    assert gap == 0 and cost(edges, chosen) <= budget
    assert squares(edges, chosen) == pytest.approx(optimum(edges, budget), rel=1e-9, abs=0)


@given(problems(), st.sampled_from([1, 1.5, 3, 4, 8]))
def test_so_it_is_whatever_the_power(problem, power):
    edges, budget = problem
    chosen, gap = smallest_sum(edges, budget, power=power)
    assert gap == 0 and cost(edges, chosen) <= budget
    assert powers(edges, chosen, power) == pytest.approx(optimum(edges, budget, power), rel=1e-9, abs=0)


@given(problems(), st.integers(1, 12), st.sampled_from([1, 4]))
def test_with_too_little_work_the_gap_holds_whatever_the_power(problem, work, power):
    edges, budget = problem
    chosen, gap = smallest_sum(edges, budget, work, power)
    found, best = powers(edges, chosen, power), optimum(edges, budget, power)
    assert 0 <= gap <= 1 and cost(edges, chosen) <= budget
    assert (1 - gap) * found <= best * (1 + 1e-9)


@given(problems(most_layers=4), st.sampled_from([1, 2, 4]), st.data())
def test_weighed_by_effects_it_is_the_smallest_sum_of_weighed_powers(problem, power, data):
    edges, budget = problem
    weights = {name: data.draw(st.floats(1e-3, 1e3)) for name in edges}
    layers = {name: candidates(edge, weights[name]) for name, edge in edges.items()}
    solution = lrc.ALDS("frobenius", "loss", power=power).solve(layers, budget)
    chosen = {name: edges[name].costs.index(cost_of(layers[name], one)) for name, one in solution.choices.items()}
    assert solution.gap == 0 and cost(edges, chosen) <= budget and solution.weights == weights
    found = fsum(weights[name] * edges[name].errors[index] ** power for name, index in chosen.items())
    raised = {
        name: replace(e, errors=[weights[name] ** (1 / power) * x for x in e.errors]) for name, e in edges.items()
    }
    assert found == pytest.approx(optimum(raised, budget, power), rel=1e-9, abs=0)


@given(problems(), st.integers(1, 12))
def test_with_too_little_work_the_sum_is_no_further_from_the_smallest_than_the_gap_says(problem, work):
    edges, budget = problem
    chosen, gap = smallest_sum(edges, budget, work)
    found, best = squares(edges, chosen), optimum(edges, budget)
    assert 0 <= gap <= 1 and cost(edges, chosen) <= budget
    assert (1 - gap) * found <= best * (1 + 1e-9)


@given(problems(most_layers=8, most_choices=9))
def test_the_sum_is_never_above_that_of_the_smallest_worst_error(problem):
    edges, budget = problem
    chosen, _ = smallest_sum(edges, budget)
    assert squares(edges, chosen) <= squares(edges, minimax(edges, budget)) * (1 + 1e-9)
    for name, index in chosen.items():
        if index + 1 < len(edges[name].costs):
            assert cost(edges, {**chosen, name: index + 1}) > budget  # nothing better is left to buy


@given(problems(most_layers=8, most_choices=9), st.data())
def test_the_order_of_the_layers_changes_no_choice(problem, data):
    edges, budget = problem
    work = data.draw(st.sampled_from([4, 2**16]))
    shuffled = dict(data.draw(st.permutations(list(edges.items()))))
    assert smallest_sum(edges, budget, work) == smallest_sum(shuffled, budget, work)


@given(frontiers(most_layers=3))
def test_a_larger_budget_never_gives_a_larger_sum(edges):
    sums = [squares(edges, smallest_sum(edges, budget)[0]) for budget in range(least(edges), least(edges) + 60, 4)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(sums))


@cache
def analyses(error: str) -> dict[str, lrc.Analysis]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Conv2d(24, 48, 1), nn.Conv2d(48, 36, (1, 5)), nn.Linear(60, 20))
    return {name: lrc.analyze(network, lrc.ALDS(error, objective=name)) for name in ("sum", "minimax")}


@pytest.mark.parametrize("error", ["slice", "operator", "bound", "frobenius"])
@given(share=st.floats(0, 1))
def test_in_a_network_the_sum_keeps_the_budget_and_is_below_that_of_minimax(error, share):
    found = analyses(error)
    low = found["sum"].reachable[0]
    allocations = {name: one.allocate(low + share * (1 - low)) for name, one in found.items()}
    assert allocations["sum"].gap == 0 and allocations["sum"].cost <= allocations["sum"].budget

    def total(allocation: lrc.Allocation) -> float:
        return fsum(one.relative_error**2 for one in allocation.factorized.values())

    assert total(allocations["sum"]) <= total(allocations["minimax"]) * (1 + 1e-9)
