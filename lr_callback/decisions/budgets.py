"""Budgets: several at once, in different units.

A method that lets each layer have any choice, whatever the others have, is solved as it is: for the largest error,
exactly under two budgets (:mod:`lr_callback.decisions.leximin`); for a sum, and under more budgets, exactly where the
combinations can be listed, otherwise with a gap (:mod:`lr_callback.decisions.several`). Any other one by a surrogate
(:mod:`lr_callback.decisions.surrogate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp

import torch
from torch import Tensor

from lr_callback.common.parallel import workers
from lr_callback.decisions.candidates import paid_in
from lr_callback.decisions.choices import Choices, list_choices
from lr_callback.decisions.leximin import fitting, smallest_errors
from lr_callback.decisions.methods import Method, Solution, Terms
from lr_callback.decisions.several import Problem, smallest_within
from lr_callback.decisions.surrogate import (
    NONE_KEEPS,
    NOT_FOUND,
    ContradictoryError,
    Layers,
    by_surrogate,
    by_survey,
    keeps,
    shares_of,
    surveyed,
    translated,
)


def solve_budgets(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution:
    """Choose what every layer becomes under several budgets at once.

    Args:
        method: that chooses.
        layers: name -> candidates; their ``costs`` are in the first unit, ``others`` in the other ones.
        budgets: unit -> what all layers together may cost in it.

    Returns:
        A solution that keeps every budget; its gap is 0 where it is the best there is. For a method without an
        objective that is not known, and the gap is 0, too. For two budgets, and a method that has terms, one is found
        if there is any. What a survey of the candidates accepts (:meth:`Method.priced`) is not refused once their
        errors are known.

    Raises:
        ContradictoryError: If none is found.
    """
    if any(budget < 0 for budget in budgets.values()):
        raise ContradictoryError(NONE_KEEPS)
    if not layers:
        return Solution({}, value=0.0)
    if len(budgets) == 1:
        return method.solve(layers, next(iter(budgets.values())))
    terms = method.terms(layers)
    if terms is None:
        return by_surrogate(method, layers, budgets)
    with workers():  # one thread: the same bits whatever their number, and for lists as short as these the quickest
        return _freely(method, terms, layers, budgets)


def _freely(method: Method, terms: Terms, layers: Layers, budgets: Mapping[str, int]) -> Solution:
    """Solve for a method that has terms.

    Raises:
        ContradictoryError: If nothing is found.
    """
    choices, limits = list_choices(layers, list(budgets), method.rank_multiple), torch.tensor(list(budgets.values()))
    # What keeps the budgets is looked for by costs alone: errors that are known later refuse nothing.
    start, certain = fitting(choices, limits)
    if start is None:
        found = None if certain else _fitting_as_surveyed(method, layers, budgets)
        if found is None:
            raise ContradictoryError(NONE_KEEPS if certain else NOT_FOUND)
        return found
    alone = _alone(method, layers, budgets)
    if alone is not None:
        return alone
    picked, gap = _smallest_sum(choices, limits, terms, start) if terms.adds_up else _leximin(choices, limits, start)
    made = choices.of(picked)
    errors = {name: float(error) for name, error in zip(choices.layers, choices.errors[picked], strict=True)}
    return Solution({name: made[name] for name in layers}, gap, terms.weights, terms.value(errors))


def _fitting_as_surveyed(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution | None:
    """Return what is found to keep the budgets before errors are known, which leave out other choices."""
    seen = {name: surveyed(layer) for name, layer in layers.items()}
    choices = list_choices(seen, list(budgets), method.rank_multiple)
    picked, _ = fitting(choices, torch.tensor(list(budgets.values())))
    if picked is None:
        return by_survey(method, layers, budgets)
    return translated(Solution(choices.of(picked), gap=1.0), layers)


def _alone(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution | None:
    """Return what is the best for one of the budgets, if it keeps the others."""
    first, *_ = budgets
    for unit, budget in budgets.items():
        paid = layers if unit == first else {name: paid_in(unit, layer) for name, layer in layers.items()}
        found = translated(method.solve(paid, budget), layers)
        if found.gap == 0 and keeps(shares_of(layers, budgets, found)):
            return found
    return None


def _leximin(choices: Choices, limits: Tensor, start: Tensor) -> tuple[Tensor, float]:
    picked, bound = smallest_errors(choices, limits, start)
    return picked, _gap(bound, float(choices.errors[picked].max()))


def _smallest_sum(choices: Choices, limits: Tensor, terms: Terms, start: Tensor) -> tuple[Tensor, float]:
    factors = torch.tensor([terms.factor(name) for name in choices.layers], dtype=torch.float64)
    charged = factors[choices.owners] * choices.errors
    # Divided by a power of two: high powers of large numbers must be finite.
    values = (charged / 2.0 ** frexp(float(charged.max()))[1]) ** terms.power
    problem = Problem(choices.owners, values, choices.costs, limits)
    found, bound = smallest_within(problem, known=start)
    picked = start if found is None else found
    return picked, _gap(bound, problem.sum(picked))


def _gap(bound: float, value: float) -> float:
    return 0.0 if value <= max(bound, 0.0) else min(1.0, 1 - bound / value)
