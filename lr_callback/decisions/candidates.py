"""Candidates: what each layer can become, with its error and its cost, and which of that is worth having."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lr_callback.decisions.costs import LayerCost


@dataclass(frozen=True)
class Candidate:
    """One (folding, num_slices) of a layer, at every rank that costs less than the dense layer.

    Args:
        folding: which kernel axes go to the decoder.
        num_slices: ``k``.
        full_rank: the smaller side of a slice.
        errors: ``(last + 1,)`` float64: entry ``r`` is the relative error at rank ``r``; infinite where it is not known
            because another candidate of the layer is no dearer and no worse.
        costs: ``(last + 1,)`` int64: entry ``r`` is the cost at rank ``r``.
        others: the same in other units, where there are budgets in several.
    """

    folding: str
    num_slices: int
    full_rank: int
    errors: Tensor
    costs: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """Largest rank that costs less than the dense layer."""
        return len(self.errors) - 1

    def cost(self, rank: int) -> int:
        """Return the cost at a rank."""
        return int(self.costs[rank])


@dataclass(frozen=True)
class LayerCandidates:
    """All candidates of a layer; staying dense is always possible.

    Args:
        dense_cost: cost of the dense layer.
        candidates: in the order of preference where cost and error are equal.
        norm: Frobenius norm of the dense weight, for what needs to know how large a relative error is; 1 where no
            weight has been looked at.
        weight: of the layer's error, to a power, among those of others; None: not known.
        others: cost of the dense layer in other units.
    """

    dense_cost: int
    candidates: tuple[Candidate, ...]
    norm: float = 1.0
    weight: float | None = None
    others: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def frontiers(self) -> dict[int, Frontier]:
        """Rank multiple -> the frontier, once :func:`frontier` has found it: each budget asks for it anew."""
        return {}


def cost_in(unit: str, layer: LayerCandidates, choice: tuple[Candidate, int] | None, first: bool) -> int:
    """Return the cost of a layer's choice in a unit.

    Args:
        unit: one of those that the layer is priced in.
        layer: its candidates.
        choice: of them.
        first: whether it is the unit of ``costs``.
    """
    if choice is None:
        return layer.dense_cost if first else layer.others[unit]
    candidate, rank = choice
    return int((candidate.costs if first else candidate.others[unit])[rank])


def paid_in(unit: str, layer: LayerCandidates) -> LayerCandidates:
    """Return a layer with its costs in another unit than the first."""
    candidates = tuple(replace(one, costs=one.others[unit]) for one in layer.candidates)
    return replace(layer, dense_cost=layer.others[unit], candidates=candidates)


@dataclass(frozen=True)
class Frontier:
    """The choices of a layer that no other choice beats: cost rises and error falls, strictly, along it.

    Args:
        costs: ascending.
        errors: descending; the last is the smallest that can be had at all.
        choices: ``(candidate, rank)`` of each; None is the dense layer.
    """

    costs: list[int]
    errors: list[float]
    choices: list[tuple[Candidate, int] | None]

    def thinned(self, most: int) -> Frontier:
        """Return at most so many of the choices, at least 2, evenly spread, with the first and the last.

        Example::

            >>> Frontier([1, 2, 3, 4], [0.4, 0.3, 0.2, 0.0], [None] * 4).thinned(2).costs
            [1, 4]
        """
        last = len(self.costs) - 1
        if last < most:
            return self
        kept = [last * step // (most - 1) for step in range(most)]
        costs, errors = [self.costs[index] for index in kept], [self.errors[index] for index in kept]
        return Frontier(costs, errors, [self.choices[index] for index in kept])


ErrorsOf = Callable[[str, Mapping[int, int]], dict[int, Tensor]]
"""From a folding and the largest rank of each number of slices: the relative errors of each number of slices."""


def layer_candidates(
    cost: LayerCost,
    foldings: Sequence[str],
    counts: Sequence[int],
    curves: ErrorsOf,
    others: Mapping[str, LayerCost] | None = None,
) -> LayerCandidates:
    """List every candidate of a layer, at every rank that costs less than the dense layer in at least one unit.

    Args:
        cost: of this layer.
        foldings: names of the foldings to try.
        counts: numbers of slices to try.
        curves: computes the errors.
        others: unit -> costs of the layer in it, where there are budgets in several.

    Raises:
        ValueError: If a folding is unknown.
    """
    found: list[Candidate] = []
    units = others or {}
    for folding in cost.distinct_foldings(foldings):
        last = _last_ranks((cost, *units.values()), folding, counts)
        errors = curves(folding, last) if last else {}
        found += [_candidate(cost, folding, count, curve, units) for count, curve in errors.items()]
    dense = {unit: one.dense for unit, one in units.items()}
    return LayerCandidates(cost.dense, tuple(found), others=dense)


def _last_ranks(costs: Sequence[LayerCost], folding: str, counts: Sequence[int]) -> dict[int, int]:
    """Return the largest rank below the dense layer's cost, in any unit, for each number of slices that has one."""
    gates = [cost for cost in costs if cost.gates]
    last = {count: max(cost.last_rank(folding, count) for cost in costs) for count in counts}
    for gate in gates:
        last = {count: min(rank, gate.last_rank(folding, count)) for count, rank in last.items()}
    return {count: rank for count, rank in last.items() if rank >= 1}


def _candidate(
    cost: LayerCost, folding: str, num_slices: int, errors: Tensor, units: Mapping[str, LayerCost]
) -> Candidate:
    full_rank, last = cost.geometry.full_rank(folding, num_slices), len(errors) - 1
    others = {unit: one.at_ranks(folding, num_slices, last) for unit, one in units.items()}
    own = cost.at_ranks(folding, num_slices, last)
    for one, costs in zip((cost, *units.values()), (own, *others.values()), strict=True):
        if one.gates:
            errors = errors.where(costs < one.dense, torch.inf)
    return Candidate(folding, num_slices, full_rank, errors, own, others)


def frontier(layer: LayerCandidates, rank_multiple: int = 1) -> Frontier:
    """Keep the choices of a layer that no other choice beats in cost and error at once.

    Args:
        layer: its candidates.
        rank_multiple: the rank must be a multiple of it.

    Example::

        >>> errors = torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64)
        >>> layer = LayerCandidates(100, (Candidate("kernel_in_encoder", 1, 4, errors, 20 * torch.arange(4)),))
        >>> edge = frontier(layer)
        >>> edge.costs, edge.errors
        ([20, 60, 100], [0.5, 0.1, 0.0])
    """
    if rank_multiple not in layer.frontiers:
        layer.frontiers[rank_multiple] = _frontier(layer, rank_multiple)
    return layer.frontiers[rank_multiple]


def _frontier(layer: LayerCandidates, rank_multiple: int) -> Frontier:
    owners: list[Tensor] = [torch.tensor([[-1, 0]])]
    costs: list[Tensor] = [torch.tensor([layer.dense_cost])]
    values: list[Tensor] = [torch.zeros(1, dtype=torch.float64)]
    for index, candidate in enumerate(layer.candidates):
        ranks = torch.arange(1, candidate.last + 1)
        ranks = ranks[ranks % rank_multiple == 0]
        owners.append(torch.stack([torch.full_like(ranks, index), ranks], dim=1))
        costs.append(candidate.costs[ranks])
        values.append(candidate.errors[ranks])
    return _lower_edge(layer, torch.cat(owners), torch.cat(costs), torch.cat(values))


def _lower_edge(layer: LayerCandidates, owners: Tensor, costs: Tensor, errors: Tensor) -> Frontier:
    """Sort the choices by cost, and keep each one whose error is below all before it."""
    by_error = errors.sort(stable=True).indices
    order = by_error[costs[by_error].sort(stable=True).indices]
    sorted_errors = errors[order]
    before = torch.cat([torch.full((1,), torch.inf, dtype=errors.dtype), sorted_errors.cummin(0).values[:-1]])
    kept = order[sorted_errors < before]
    choices = [None if index < 0 else (layer.candidates[index], rank) for index, rank in owners[kept].tolist()]
    return Frontier(costs[kept].tolist(), errors[kept].tolist(), choices)
