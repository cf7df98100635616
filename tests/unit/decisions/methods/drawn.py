"""Layers that the tests of methods share, and what is asked about choices among them."""

import torch

from lr_callback.decisions.candidates import LayerCandidates
from lr_callback.decisions.costs import CountedCost
from lr_callback.decisions.methods import (
    Method,
    cost_of,
)
from lr_callback.mathematics.folding import Geometry

GEOMETRIES = {
    "wide": Geometry(8, 12, (3, 3)),
    "tall": Geometry(24, 6),
    "square": Geometry(12, 12, (1, 1)),
    "grouped": Geometry(16, 24, (3,), groups=2),
}


def weights() -> dict[str, torch.Tensor]:
    """Draw weights whose singular values fall at different speeds."""
    drawn = {}
    for seed, (name, geometry) in enumerate(GEOMETRIES.items()):
        weight = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(seed))
        decay = torch.arange(1, geometry.out_channels + 1) ** -(0.4 * (seed + 1))
        drawn[name] = weight * decay.view(-1, *[1] * (weight.dim() - 1))
    return drawn


def analysed(method: Method, crew) -> dict[str, LayerCandidates]:
    return {name: method.candidates(one, CountedCost(GEOMETRIES[name], 4), crew) for name, one in weights().items()}


def total(layers, choices) -> int:
    return sum(cost_of(layers[name], choice) for name, choice in choices.items())


def error_of(choice) -> float:
    return 0.0 if choice is None else choice[0].errors[choice[1]].item()


def dense(layers) -> int:
    return sum(layer.dense_cost for layer in layers.values())


def budgets(method: Method, layers, count: int = 12) -> list[int]:
    low, high = method.smallest_cost(layers), dense(layers)
    return [low + (high - low) * step // count for step in range(count + 1)]


def pairs(layer: LayerCandidates) -> list[tuple[int, float]]:
    """List cost and error of all that a layer can become."""
    ranks = [(one, rank) for one in layer.candidates for rank in range(1, one.last + 1)]
    return [(layer.dense_cost, 0.0), *((one.cost(rank), one.errors[rank].item()) for one, rank in ranks)]
