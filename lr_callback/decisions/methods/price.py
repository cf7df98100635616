"""Rules with one price of a unit of cost for all layers, against what is dropped: L-Rank and PCA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import log

from lr_callback.decisions.candidates import Frontier, LayerCandidates, frontier
from lr_callback.decisions.hull import Curve, Step, steps
from lr_callback.decisions.methods.base import Choice, Method

_LEAST = 1e-300  # of a kept share whose logarithm is taken


class _PriceRule(Method):
    """A rule with one price: each layer takes the choice with the smallest loss plus price times cost.

    The price is the smallest whose choices fit the budget. It is found exactly: as it falls, each layer moves along the
    lower convex hull of its costs and losses (:mod:`lr_callback.decisions.hull`), all layers in the order of the price
    at which they move.
    """

    @abstractmethod
    def losses(self, edge: Frontier, layer: LayerCandidates) -> list[float]:
        """Return what each choice of a layer loses, descending."""

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Let the price fall until the next step of a layer no longer fits the budget."""
        return self.sketch(layers, [budget])[0]

    def sketch(self, layers: Mapping[str, LayerCandidates], budgets: Sequence[int]) -> list[dict[str, Choice]]:
        """Choose for several budgets, exactly: the way of the price is the same for all."""
        edges = {name: frontier(layer) for name, layer in layers.items()}
        curves = {name: Curve(edge.costs, self.losses(edge, layers[name])) for name, edge in edges.items()}
        # Layers that move at the very same price move together: there is one price for all.
        moves = [list(together) for _, together in groupby(steps(curves), key=lambda step: step.gain)]
        chosen = [_fall(edges, moves, budget) for budget in budgets]
        return [{name: edge.choices[found[name]] for name, edge in edges.items()} for found in chosen]

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost of rank 1 in every layer that has one."""
        return sum(frontier(layer).costs[0] for layer in layers.values())


def _fall(edges: Mapping[str, Frontier], moves: Sequence[Sequence[Step]], budget: int) -> dict[str, int]:
    """Return the index of each layer's choice at the smallest price whose choices fit a budget."""
    left = budget - sum(edge.costs[0] for edge in edges.values())
    if left < 0:
        raise ValueError(f"`budget` must be at least {budget - left}, got {budget}.")
    chosen = dict.fromkeys(edges, 0)
    for together in moves:
        left -= sum(step.cost for step in together)
        if left < 0:
            break
        chosen.update({step.name: step.index for step in together})
    return chosen


class LRank(_PriceRule):
    """One price for all layers: each takes ``argmin_j price * cost(j) + sum_{i > j} sigma_i^2``; plain SVD, one slice.

    The energies are those of the weights as they are, not relative to the layer: a layer of large weights keeps more.

    Source: Idelbayev, Carreira-Perpinan, "Low-rank compression of neural nets: Learning the rank of each layer" (CVPR
    2020), equation of the C step; the comparison method "L-Rank" of arXiv 2107.11442. Differences: ranks are chosen
    once, from the weights as they are, where the source alternates with training towards the low-rank weights; the
    price is that of a budget; a layer keeps rank 1 at least, and may stay dense, at the dense cost and no energy lost.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> from torch import nn
        >>> allocation = allocate(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), 0.5, method=LRank())
        >>> {layer.num_slices for layer in allocation.factorized.values()}
        {1}
    """

    def __init__(self) -> None:
        super().__init__("frobenius", max_slices=1)

    def losses(self, edge: Frontier, layer: LayerCandidates) -> list[float]:
        """Return the energies that are dropped."""
        return [(layer.norm * error) ** 2 for error in edge.errors]


class PCA(_PriceRule):
    """The principal components of each layer's outputs, ranks such that the product of kept energies is large.

    With the eigenvalues ``s_1 >= s_2 >= ...`` of the second moments ``W E[x x^T] W^T`` of a layer's outputs, rank ``j``
    keeps the share ``E(j) = sum_{i <= j} s_i / sum_i s_i`` of their energy. The product of the shares of all layers is
    to be large: each takes ``argmin_j price * cost(j) - log E(j)``. One slice; the importance of the layers' inputs
    must be known, as for ``error="activation"``: the callback measures it, :func:`lr_callback.collect_moments` does so
    without a Trainer.

    Source: Zhang, Zou, He, Sun, "Accelerating very deep convolutional networks for classification and detection"
    (arXiv 1505.06798), section on rank selection: drop, over and over, the component with the smallest
    ``(s_j / sum_{i <= j} s_i) / cost of a rank``; the comparison method "PCA" of arXiv 2107.11442. Differences: a
    component counts ``log(E(j) / E(j - 1))``, the share that it adds to the product, where the source takes the first
    order of it; moments are centred only where a bias, or the BatchNorm after the layer, takes up the mean; layers are
    decomposed at once and for their own outputs, not one after the other for what comes after the ReLU; a layer may
    stay dense, at the dense cost and all of its energy; the cost is that of the budget, where the source counts
    multiply-adds.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from lr_callback import allocate, collect_moments
        >>> model, batches = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), [torch.randn(256, 64)]
        >>> allocation = allocate(model, 0.5, method=PCA(), importance=collect_moments(model, batches))
        >>> {layer.num_slices for layer in allocation.factorized.values()}
        {1}
    """

    def __init__(self) -> None:
        super().__init__("activation", max_slices=1)

    def losses(self, edge: Frontier, layer: LayerCandidates) -> list[float]:
        """Return minus the logarithms of the shares of energy that are kept."""
        return [-log(max(1.0 - error**2, _LEAST)) for error in edge.errors]
