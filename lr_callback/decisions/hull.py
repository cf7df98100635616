"""Hulls: of the choices of a layer, those that are best at some price of a unit of cost.

At a price ``p`` a layer on its own takes the choice with the smallest ``value + p * cost``. As the price falls it moves
along the lower convex hull of its choices, and each step along it is worth ``gain``, the price at which it is taken.
All layers together at one price: that is the Lagrangian relaxation of sharing a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """The choices of a layer: what each costs, and what it is charged for.

    Args:
        costs: ascending.
        values: descending, not negative.
    """

    costs: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Step:
    """A step of a layer along its hull.

    Args:
        gain: fall of the value for each unit of cost.
        name: of the layer.
        index: of the choice that it leads to.
        cost: what it takes.
    """

    gain: float
    name: str
    index: int
    cost: int


def steps(curves: Mapping[str, Curve]) -> list[Step]:
    """Return every layer's steps from its cheapest choice to its best, those of the largest gain first.

    Args:
        curves: layer name -> its choices.

    Returns:
        Of one layer in the order in which it takes them; of layers with the very same gain by name.

    Example::

        >>> [(step.name, step.index, step.gain) for step in steps({"one": Curve([1, 2, 3], [9.0, 8.0, 3.0])})]
        [('one', 2, 3.0)]
    """
    found = [step for name, curve in curves.items() for step in _steps(name, curve)]
    return sorted(found, key=lambda step: (-step.gain, step.name, step.index))


def _steps(name: str, curve: Curve) -> list[Step]:
    """Walk along the costs, and take back each step that the next one beats."""
    at, taken = [0], list[Step]()
    for index in range(1, len(curve.costs)):
        while taken and _gain(curve, at[-1], index) >= taken[-1].gain:
            taken.pop()
            at.pop()
        gain, cost = _gain(curve, at[-1], index), curve.costs[index] - curve.costs[at[-1]]
        taken.append(Step(gain, name, index, cost))
        at.append(index)
    return taken


def _gain(curve: Curve, start: int, end: int) -> float:
    return (curve.values[start] - curve.values[end]) / (curve.costs[end] - curve.costs[start])
