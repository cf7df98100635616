"""Sampling: from candidates to curves: the errors of a layer at some ranks, and the singular values that they tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite, sqrt

from lr_callback.decisions.candidates import Candidate, LayerCandidates
from lr_callback.decisions.curves import LayerCurve, Point
from lr_callback.decisions.factorization import Factorization

MOST_RANKS = 64
"""Of a layer."""
MOST_LAYERS = 200
"""Of a model."""
BUDGETS = 20
"""At which the trade-off is told, of models with many layers fewer."""
_FEWEST, _SOLVED = 5, 4000
"""Budgets at least; choices of layers that are made for all budgets together, if that leaves so many."""


def layer_curves(
    layers: Mapping[str, LayerCandidates], chosen: Mapping[str, Factorization | None], error: str
) -> tuple[dict[str, LayerCurve], int]:
    """Return the curves of the largest layers, and the number of the others.

    Args:
        layers: name -> candidates, at least one of each.
        chosen: layer name -> what it becomes.
        error: name of the error measure.
    """
    largest = set(sorted(layers, key=lambda name: -layers[name].dense_cost)[:MOST_LAYERS])
    kept = {name: layer_curve(layers[name], chosen[name], error) for name in layers if name in largest}
    return kept, len(layers) - len(kept)


def layer_curve(layer: LayerCandidates, chosen: Factorization | None, error: str) -> LayerCurve:
    """Return the curve of a layer.

    Args:
        layer: its candidates, at least one.
        chosen: what it becomes; None: it stays dense, and the curve is that of its first candidate.
        error: name of the error measure.

    Example::

        >>> import torch
        >>> errors = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
        >>> layer = LayerCandidates(100, (Candidate("kernel_in_encoder", 1, 4, errors, 20 * torch.arange(3)),))
        >>> curve = layer_curve(layer, None, "slice")
        >>> curve.ranks, curve.errors, curve.values
        ((1, 2), (0.5, 0.25), (1.0, 0.5))
    """
    candidate = next(one for one in layer.candidates if _is_chosen(one, chosen))
    rank = None if chosen is None else chosen.rank
    errors = candidate.errors.tolist()
    ranks = [one for one in _some(candidate.last, rank) if isfinite(errors[one])]
    return LayerCurve(
        folding=candidate.folding,
        num_slices=candidate.num_slices,
        rank=rank,
        full_rank=candidate.full_rank,
        dense_cost=layer.dense_cost,
        ranks=tuple(ranks),
        errors=tuple(errors[one] for one in ranks),
        values=_values(errors, ranks, _told_by(error, candidate.num_slices)),
    )


def can_become(layer: LayerCandidates, chosen: Factorization) -> bool:
    """Return whether a choice is one of a layer's candidates at one of its ranks."""
    return any(_is_chosen(one, chosen) and chosen.rank <= one.last for one in layer.candidates)


def _is_chosen(candidate: Candidate, chosen: Factorization | None) -> bool:
    return chosen is None or (candidate.folding, candidate.num_slices) == (chosen.folding, chosen.num_slices)


def _some(last: int, rank: int | None) -> list[int]:
    """Return ranks from 1 to the last, each further from the next by about the same factor, with one among them."""
    steps = MOST_RANKS - 2
    spread = {round(last ** (step / steps)) for step in range(steps + 1)} if last > MOST_RANKS else range(1, last + 1)
    return sorted({*spread} | ({rank} if rank is not None else set()))


def _told_by(error: str, num_slices: int) -> str:
    """Return how errors tell singular values: an error is the next of them, or the root of the sum of all to come."""
    if error in ("slice", "bound") or (error == "operator" and num_slices == 1):
        return "next"
    return "" if error == "operator" else "energy"


def _values(errors: list[float], ranks: list[int], told: str) -> tuple[float | None, ...]:
    """Return the singular values at some ranks relative to that at rank 1, None where the errors do not tell it."""
    first = _value(errors, 1, told)
    if not first or not isfinite(first):
        return (None,) * len(ranks)
    values = [_value(errors, rank, told) / first for rank in ranks]
    return tuple(min(value, 1.0) if isfinite(value) else None for value in values)


def _value(errors: list[float], rank: int, told: str) -> float:
    """Return the singular value at a rank, relative to the norm of the layer; infinity where it is not known."""
    before, after = errors[rank - 1], errors[rank]
    if told == "next":
        return before
    if told == "energy" and isfinite(before) and isfinite(after):
        return sqrt(max(0.0, (before - after) * (before + after)))
    return inf


def point(cost: int, errors: Iterable[float], layers: int) -> Point:
    """Return a model of a size.

    Args:
        cost: of it.
        errors: of the layers that do not stay dense.
        layers: number of all of them.

    Example::

        >>> point(10, [0.5, 0.25], layers=3)
        Point(cost=10, worst_error=0.5, mean_error=0.25)
    """
    listed = list(errors)
    return Point(cost, max(listed, default=0.0), sum(listed) / max(1, layers))


def spread_budgets(smallest: int, largest: int, layers: int) -> list[int]:
    """Return budgets from the smallest to the largest, evenly spaced, ascending and all different.

    Args:
        smallest: that can be met.
        largest: cost of the dense model.
        layers: number of layers: the more there are, the longer a budget takes.

    Example::

        >>> spread_budgets(10, 50, layers=10_000), spread_budgets(5, 5, layers=1)
        ([10, 20, 30, 40, 50], [5])
    """
    span, most = largest - smallest, max(_FEWEST, min(BUDGETS, _SOLVED // max(1, layers)))
    return sorted({smallest + span * step // (most - 1) for step in range(most)}) if span >= 0 else []
