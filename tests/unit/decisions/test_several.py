"""Several budgets against every combination of choices: what is exact, and what the bound says where it is not."""

import itertools
import random
from math import inf

import pytest
import torch

from lr_callback.decisions import several
from lr_callback.decisions.candidates import Candidate, LayerCandidates
from lr_callback.decisions.choices import list_choices, unbeaten
from lr_callback.decisions.leximin import fitting, smallest_errors
from lr_callback.decisions.several import Problem, smallest_within

UNITS = ("parameters", "multiply_adds", "bytes", "latency")


def drawn(seed, units, most_layers=4, most_ranks=5, largest=1000, distinct=True):
    """Draw the choices of some layers, with costs that do not rise alike in each unit, and budgets for all."""
    draw = random.Random(seed)
    layers = {}
    for name in "abcdef"[: draw.randint(1, most_layers)]:
        candidates = []
        for slices in range(1, draw.randint(1, 2) + 1):
            last = draw.randint(1, most_ranks)
            values = [draw.uniform(0.02, 0.98) if distinct else draw.choice((0.3, 0.6)) for _ in range(last)]
            errors = torch.tensor([1.0, *sorted(values, reverse=True)], dtype=torch.float64)
            costs = [torch.tensor([0, *(draw.randint(1, largest) for _ in range(last))]).cumsum(0) for _ in units]
            others = dict(zip(units[1:], costs[1:], strict=True))
            candidates.append(Candidate("kernel_in_encoder", slices, 9, errors, costs[0], others))
        dense = [draw.randint(1, largest * most_ranks) for _ in units]
        layers[name] = LayerCandidates(dense[0], tuple(candidates), others=dict(zip(units[1:], dense[1:], strict=True)))
    highest = int(largest * most_ranks * len(layers) * 0.7)
    return list_choices(layers, units), torch.tensor([draw.randint(1, highest) for _ in units])


def every_fitting(choices, budgets):
    """Return the places of the choices of each combination that keeps the budgets, ``(combinations, layers)``."""
    own = [torch.nonzero(choices.owners == layer).flatten().tolist() for layer in range(len(choices.layers))]
    listed = torch.tensor(list(itertools.product(*own)))
    return listed[(choices.costs[:, listed].sum(2) <= budgets[:, None]).all(0)]


def keeps(choices, budgets, picked):
    assert choices.owners[picked].tolist() == list(range(len(choices.layers)))
    return bool((choices.costs[:, picked].sum(1) <= budgets).all())


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("seed", range(25))
def test_what_keeps_all_budgets_is_found_if_and_only_if_there_is_any(units, seed):
    choices, budgets = drawn(seed, UNITS[:units])
    picked, certain = fitting(choices, budgets)
    assert certain and (picked is not None) == bool(len(every_fitting(choices, budgets)))
    assert picked is None or keeps(choices, budgets, picked)


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("seed", range(25))
def test_with_distinct_errors_all_errors_together_are_the_leximin_ones(units, seed):
    choices, budgets = drawn(seed, UNITS[:units])
    start, _ = fitting(choices, budgets)
    if start is None:
        return
    picked, bound = smallest_errors(choices, budgets, start)
    assert keeps(choices, budgets, picked)
    vectors = choices.errors[every_fitting(choices, budgets)].sort(dim=1, descending=True).values.tolist()
    assert sorted(choices.errors[picked].tolist(), reverse=True) == min(vectors)
    assert bound == min(vectors)[0]


@pytest.mark.parametrize("units", [2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_of_errors_that_often_coincide_the_largest_is_the_smallest_of_all_combinations(units, seed):
    choices, budgets = drawn(seed, UNITS[:units], distinct=False, largest=3)
    start, _ = fitting(choices, budgets)
    if start is None:
        return
    picked, bound = smallest_errors(choices, budgets, start)
    best = float(choices.errors[every_fitting(choices, budgets)].amax(1).min())
    assert keeps(choices, budgets, picked) and float(choices.errors[picked].max()) == best == bound


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("seed", range(15))
def test_the_sum_is_the_smallest_of_all_combinations_and_so_is_its_bound(units, seed, power):
    choices, budgets = drawn(seed, UNITS[:units])
    problem = Problem(choices.owners, choices.errors**power, choices.costs, budgets)
    listed = every_fitting(choices, budgets)
    found, bound = smallest_within(problem)
    if not len(listed):
        assert found is None and bound == inf
        return
    best = float(problem.values[listed].sum(1).min())
    assert found is not None and keeps(choices, budgets, found)
    assert problem.sum(found) == pytest.approx(best, rel=1e-9) == bound


@pytest.mark.parametrize("units", [2, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_with_little_work_the_bound_is_true_and_what_is_known_is_never_made_worse(units, width, monkeypatch):
    monkeypatch.setattr(several, "_WORK", width)
    monkeypatch.setattr(several, "_WIDTH", width)
    passed_over = 0
    for seed in range(60):
        choices, budgets = drawn(seed, UNITS[:units], most_layers=5, most_ranks=4)
        listed = every_fitting(choices, budgets)
        if not len(listed):
            continue
        problem = Problem(choices.owners, choices.errors**2, choices.costs, budgets)
        found, bound = smallest_within(problem, known=listed[0])
        assert found is not None and keeps(choices, budgets, found)
        best = float(problem.values[listed].sum(1).min())
        assert bound <= best * (1 + 1e-9) and best * (1 - 1e-9) <= problem.sum(found) <= problem.sum(listed[0]) + 1e-12
        passed_over += bound < problem.sum(found)
    assert passed_over > 0, "the bound is never short of the sum: no work was spared"


@pytest.mark.parametrize("width", [1, 4])
def test_with_little_work_the_largest_error_is_not_below_what_it_is_told_to_be_at_least(width, monkeypatch):
    monkeypatch.setattr(several, "_WORK", width)
    monkeypatch.setattr(several, "_WIDTH", width)
    for seed in range(40):
        choices, budgets = drawn(seed, UNITS[:3], most_layers=5, most_ranks=4)
        listed = every_fitting(choices, budgets)
        found, certain = fitting(choices, budgets)
        assert found is None or keeps(choices, budgets, found)
        assert len(listed) or found is None
        if not len(listed):
            continue
        assert found is not None or not certain
        picked, bound = smallest_errors(choices, budgets, listed[0])
        best = float(choices.errors[listed].amax(1).min())
        assert keeps(choices, budgets, picked) and bound <= best <= float(choices.errors[picked].max())


def test_a_sum_that_will_do_is_enough_and_none_is_made_up():
    choices, budgets = drawn(9, UNITS[:3])
    problem = Problem(choices.owners, choices.errors, choices.costs, budgets)
    best, bound = smallest_within(problem)
    assert best is not None and bound == problem.sum(best) > 0
    found, _ = smallest_within(problem, target=1.5 * bound)
    assert found is not None and problem.sum(found) <= 1.5 * bound
    found, least = smallest_within(problem, target=0.99 * bound)
    assert found is None and 0.98 * bound < least <= bound


def test_a_budget_of_nothing_is_kept_by_what_costs_nothing():
    problem = Problem(
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.0, 0.5, 0.0, 0.7], dtype=torch.float64),
        torch.tensor([[5, 0, 0, 0], [1, 2, 9, 0]]),
        torch.tensor([0, 11]),
    )
    found, bound = smallest_within(problem)
    assert found is not None and found.tolist() == [1, 2] and bound == 0.5
    none, bound = smallest_within(Problem(problem.owners, problem.values, problem.costs, torch.tensor([0, 1])))
    assert none is None and bound == inf


def test_choices_are_those_that_none_beats_in_everything_whatever_the_order_of_the_layers():
    choices, _ = drawn(7, UNITS[:3])
    for layer in range(len(choices.layers)):
        own = choices.owners == layer
        rows = torch.cat([choices.errors[None, own], choices.costs[:, own].double()]).T.tolist()
        beaten = [one for one in rows if any(other != one and all(map(float.__le__, other, one)) for other in rows)]
        assert not beaten and len(set(map(tuple, rows))) == len(rows)
    again = list_choices(dict(reversed(choices.layers.items())), UNITS[:3])
    assert list(again.layers) == list(choices.layers) and torch.equal(again.costs, choices.costs)


def test_of_many_all_that_are_beaten_by_a_few_are_left_out():
    draw = torch.Generator().manual_seed(0)
    columns = torch.rand(2, 3000, generator=draw, dtype=torch.float64)
    columns = columns[:, columns.sum(0).sort().indices]
    kept = unbeaten(columns)
    one, other = columns[:, kept]
    assert len(kept) < 40 and not ((one < one[:, None]) & (other < other[:, None])).any()
