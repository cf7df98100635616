"""L-Rank: one price of a unit of cost for all layers, against the energy that is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from lr_callback.candidates import Frontier, LayerCandidates, frontier
from lr_callback.hull import Curve, steps
from lr_callback.methods.base import Choice, Method


class LRank(Method):
    """One price for all layers: each takes ``argmin_j price * cost(j) + sum_{i > j} sigma_i^2``; plain SVD, one slice.

    The energies are those of the weights as they are, not relative to the layer: a layer of large weights keeps more.
    The price is the smallest whose choices fit the budget. It is found exactly: as it falls, each layer moves along the
    lower convex hull of its costs and energies (:mod:`lr_callback.hull`), all layers in the order of the price at which
    they move.

    Source: Idelbayev, Carreira-Perpinan, "Low-rank compression of neural nets: Learning the rank of each layer" (CVPR
    2020), equation of the C step; the comparison method "L-Rank" of arXiv 2107.11442. Differences: ranks are chosen
    once, from the weights as they are, where the source alternates with training towards the low-rank weights; the
    price is that of a budget; a layer keeps rank 1 at least, and may stay dense, at the dense cost and no energy lost.

    Example::

        >>> from lr_callback.analysis import allocate
        >>> from torch import nn
        >>> allocation = allocate(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), 0.5, method=LRank())
        >>> {layer.num_slices for layer in allocation.factorized.values()}
        {1}
    """

    def __init__(self) -> None:
        super().__init__("frobenius", max_slices=1)

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Let the price fall until the next step of a layer no longer fits the budget."""
        edges = {name: frontier(layer) for name, layer in layers.items()}
        left = budget - sum(edge.costs[0] for edge in edges.values())
        if left < 0:
            raise ValueError(f"`budget` must be at least {budget - left}, got {budget}.")
        chosen = dict.fromkeys(edges, 0)
        curves = {name: _energies(edge, layers[name].norm) for name, edge in edges.items()}
        # Layers that move at the very same price move together: there is one price for all.
        for _, together in groupby(steps(curves), key=lambda step: step.gain):
            moves = list(together)
            left -= sum(step.cost for step in moves)
            if left < 0:
                break
            chosen.update({step.name: step.index for step in moves})
        return {name: edge.choices[chosen[name]] for name, edge in edges.items()}

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost of rank 1 in every layer that has one."""
        return sum(frontier(layer).costs[0] for layer in layers.values())


def _energies(edge: Frontier, norm: float) -> Curve:
    return Curve(edge.costs, [(norm * error) ** 2 for error in edge.errors])
