"""Goals: what an allocation is to meet, as a user says it.

A goal is a fraction of the model to keep; or fractions in several units, which all hold, ``{"parameters": 0.3,
"multiply_adds": 0.6}``; or ``{"max_error": 0.2}``, the smallest model in which no layer errs by more; or, in a Trainer,
``{"max_accuracy_drop": 0.01}``, the smallest model whose accuracy right after the cut is no further below.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TypeAlias

from lr_callback.common.written import is_number
from lr_callback.decisions.costs import ACTIVATION_MEMORY, COSTS, Unit, most_of

Goal: TypeAlias = "float | Mapping[str, float]"

MAX_ERROR = "max_error"
MAX_ACCURACY_DROP = "max_accuracy_drop"
NOT_ALONE = (
    f"{ACTIVATION_MEMORY!r} cannot be asked for alone: but for the copies of weights that autocast makes, a factorized "
    "layer keeps as much for the backward pass as the dense one, and what is between its factors besides. Give it in "
    "`budget` beside another unit, as the fraction that it may grow to: "
    f"budget={{'parameters': 0.3, '{ACTIVATION_MEMORY}': 1.2}}."
)
_OPEN = (MAX_ERROR, MAX_ACCURACY_DROP)
"""Goals that leave open how much is kept, in the one unit of ``cost``."""


def check_keep_ratio(keep_ratio: object) -> float:
    """Return the ratio as a float.

    Raises:
        ValueError: If it is not a number in (0, 1].
    """
    if is_number(keep_ratio) and 0 < float(keep_ratio) <= 1:
        return float(keep_ratio)
    raise ValueError(f"`keep_ratio` must be a number in (0, 1], the fraction of the model to keep, got {keep_ratio!r}.")


def check_goal(goal: object) -> Goal:
    """Return a goal with its numbers as floats.

    Raises:
        ValueError: If it is none.

    Example::

        >>> check_goal({"parameters": 1, "multiply_adds": 0.5})
        {'parameters': 1.0, 'multiply_adds': 0.5}
    """
    if not isinstance(goal, Mapping) or not goal:
        return check_keep_ratio(goal)
    if set(goal) == {MAX_ERROR}:
        return {MAX_ERROR: _check_max_error(goal[MAX_ERROR])}
    if set(goal) == {MAX_ACCURACY_DROP}:
        return {MAX_ACCURACY_DROP: _check_max_accuracy_drop(goal[MAX_ACCURACY_DROP])}
    return _check_budget(goal)


def is_open(goal: object) -> bool:
    """Return whether a goal leaves open how much is kept, and so can be met by any model.

    Example::

        >>> is_open({"max_error": 0.2}), is_open({"parameters": 0.5}), is_open(0.5)
        (True, False, False)
    """
    return isinstance(goal, Mapping) and any(name in goal for name in _OPEN)


def drop_of(goal: object) -> float | None:
    """Return by how much the accuracy may be lower, of a goal that asks for that; else None."""
    return goal[MAX_ACCURACY_DROP] if isinstance(goal, Mapping) and MAX_ACCURACY_DROP in goal else None


def _check_max_error(error: object) -> float:
    if is_number(error) and 0 < float(error) <= 1:
        return float(error)
    raise ValueError(f"`max_error` must be a number in (0, 1], the largest relative error of a layer, got {error!r}.")


def _check_max_accuracy_drop(drop: object) -> float:
    if is_number(drop) and 0 < float(drop) < inf:
        return float(drop)
    raise ValueError(
        "`max_accuracy_drop` must be a number above 0, by how much the monitored metric may be lower right after the "
        f"cut, in its own unit (0.01 of an accuracy up to 1, 1 of one in percent), got {drop!r}."
    )


def _check_budget(budget: object) -> dict[str, float]:
    if not isinstance(budget, Mapping) or not budget or not all(isinstance(unit, str) for unit in budget):
        own = "; a cost of your own can be asked for as `cost` alone, with `keep_ratio`"
        raise ValueError(_no_budget(budget, own if isinstance(budget, Mapping) and budget else ""))
    if not all(unit in COSTS for unit in budget):
        raise ValueError(_no_budget(budget))
    for unit, ratio in budget.items():
        if not is_number(ratio) or not 0 < float(ratio) <= most_of(unit):
            raise ValueError(
                f"`budget`: the fraction of {unit} to keep must be a number in (0, {most_of(unit):g}], got {ratio!r}."
            )
    if set(budget) == {ACTIVATION_MEMORY}:
        raise ValueError(NOT_ALONE)
    # The first is the unit of the allocation, in which every factorized layer costs less.
    return {unit: float(budget[unit]) for unit in sorted(budget, key=ACTIVATION_MEMORY.__eq__)}


def _no_budget(budget: object, more: str = "") -> str:
    return (
        f"`budget` must map units to fractions to keep, such as {{'parameters': 0.3, 'multiply_adds': 0.6}}; units "
        f"are {', '.join(COSTS)}{more}; got {budget!r}."
    )


def one_goal(
    keep_ratio: object, budget: object, max_error: object, cost: Unit, max_accuracy_drop: object = None
) -> object:
    """Return what is asked for, by the one argument that is given.

    Args:
        keep_ratio: a fraction, or what holds several.
        budget: unit -> fraction.
        max_error: of each layer.
        cost: unit of the fraction; a budget names its own.
        max_accuracy_drop: right after the cut, of what a validation measures.

    Raises:
        ValueError: If more than one is given, or what is given is no goal; a ``keep_ratio`` is not looked at.
    """
    given = {"keep_ratio": keep_ratio, "budget": budget, MAX_ERROR: max_error, MAX_ACCURACY_DROP: max_accuracy_drop}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            "Only one of `keep_ratio`, `budget`, `max_error` and, in a Trainer, `max_accuracy_drop` can be asked for, "
            f"got {' and '.join(names)}."
        )
    if budget is not None:
        if cost != COSTS[0]:
            raise ValueError(
                f"`cost` is the unit of `keep_ratio`; a `budget` names its own units, got cost={cost!r}, too."
            )
        return _check_budget(budget)
    if cost == ACTIVATION_MEMORY:
        raise ValueError(NOT_ALONE)
    if max_error is not None:
        return {MAX_ERROR: _check_max_error(max_error)}
    if max_accuracy_drop is not None:
        return {MAX_ACCURACY_DROP: _check_max_accuracy_drop(max_accuracy_drop)}
    if isinstance(keep_ratio, Mapping):
        check_keep_ratio(keep_ratio)
    return 0.5 if keep_ratio is None else keep_ratio


def units_of(goal: object, cost: Unit) -> tuple[Unit, ...]:
    """Return the units that a goal takes; the first is that of an allocation.

    Example::

        >>> units_of({"bytes": 0.5, "multiply_adds": 0.5}, "parameters"), units_of(0.5, "bytes")
        (('bytes', 'multiply_adds'), ('bytes',))
    """
    return tuple(goal) if isinstance(goal, Mapping) and not is_open(goal) else (cost,)
