"""Layer by layer: the candidates of all layers, small ones several at a time, each large one by all workers.

A small layer is too little work to be shared, and a large one takes too much memory for two of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import nn

from lr_callback.common.parallel import Workers, workers
from lr_callback.decisions.candidates import LayerCandidates
from lr_callback.decisions.costs import LayerCost
from lr_callback.decisions.methods import Method
from lr_callback.layers.layer_types import dense_weight
from lr_callback.mathematics.importance import Importance
from lr_callback.units.latency import Progress

_SMALL = 2**18  # parameters of a layer of which several are always analysed at once


def candidates_of(
    layers: Mapping[str, nn.Module],
    costs: Mapping[str, LayerCost],
    methods: Mapping[str, Method],
    progress: Progress | None,
    importance: Mapping[str, Importance] | None = None,
    others: Mapping[str, Mapping[str, LayerCost]] | None = None,
) -> dict[str, LayerCandidates]:
    """Compute the candidates of some layers.

    Args:
        layers: dense or factorized.
        costs: of each of them, and perhaps of others.
        methods: whose candidates they are, of each of them.
        progress: told of each layer.
        importance: of the layers, where the errors are weighted by it.
        others: layer name -> unit -> its cost, where there are budgets in several units.
    """
    known, units = importance or {}, others or {}

    def candidates(name: str, crew: Workers) -> LayerCandidates:
        with torch.no_grad():
            own = (costs[name], crew, known.get(name), units.get(name))
            return methods[name].candidates(dense_weight(layers[name]), *own)

    small = _small(layers, costs)
    order = list(dict.fromkeys([*small, *layers]))
    made: dict[str, LayerCandidates] = {}
    with workers() as crew:
        together = crew.each_alone(candidates, small)
        for done, name in enumerate(order):
            if progress is not None:
                progress(done, len(layers), name)
            made[name] = next(together) if done < len(small) else candidates(name, crew)
    return {name: made[name] for name in layers}


def _small(layers: Mapping[str, nn.Module], costs: Mapping[str, LayerCost]) -> list[str]:
    """Return the layers to analyse side by side: as many as there are workers take no more memory than the largest."""
    sizes = {name: prod(costs[name].geometry.weight_shape) for name in layers}
    limit = max(_SMALL, max(sizes.values(), default=0) // (2 * torch.get_num_threads()))
    on_cpu = {name for name, layer in layers.items() if all(one.device.type == "cpu" for one in layer.parameters())}
    return [name for name, size in sizes.items() if size <= limit and name in on_cpu]
