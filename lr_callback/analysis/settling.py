"""Settling: whether the spectra of a network's layers still change from epoch to epoch.

The stable rank of a layer, ``||W||_F^2 / ||W||_2^2``, is the number of its directions that count, weighed by how much
they do; it falls while a network learns, and what can be cut off is known once it has come to rest. It takes a few
products with the weight, no decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from statistics import median

import torch
from torch import nn

from lr_callback.layers.layer_types import dense_weight, layer_type
from lr_callback.mathematics.folding import fold
from lr_callback.mathematics.ranks import stable_rank
from lr_callback.model.find import find_layers

PATIENCE = 2
TOLERANCE = 0.02
_STEPS = 64  # what has settled is told from what has not long before the last digits have


@torch.no_grad()
def stable_ranks(
    model: nn.Module,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
) -> dict[str, float]:
    """Return the stable rank of every layer that can be factorized, with all kernel axes on the side of its inputs.

    Args:
        model: dense or factorized.
        include: see :func:`lr_callback.allocate`.
        exclude: see :func:`lr_callback.allocate`.
        embeddings: whether ``nn.Embedding`` layers are among them.

    Example::

        >>> list(stable_ranks(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
        ['0']
    """
    found: dict[str, float] = {}
    for name, layer in find_layers(model, include, exclude).layers.items():
        kind = layer_type(layer)
        assert kind is not None
        if embeddings or kind.only_if_asked is None:
            matrices = fold(dense_weight(layer), "kernel_in_encoder", 1, kind.geometry(layer).groups)
            found[name] = float(stable_rank(matrices, _STEPS))
    return found


def has_settled(history: Sequence[Mapping[str, float]], patience: int = PATIENCE, tolerance: float = TOLERANCE) -> bool:
    """Return whether stable ranks have come to rest: the median layer is where it was in each of the last epochs.

    With ``s_e`` those of epoch ``e``, the rule is ``median |s_e - s_(e-j)| / s_(e-j) < tolerance`` for each ``j`` from
    1 to ``patience``, the median being over the layers.

    Args:
        history: layer name -> stable rank, one for each epoch, the latest last.
        patience: number of epochs before the latest that are looked at.
        tolerance: of the relative change.

    Example::

        >>> has_settled([{"a": 10.0}, {"a": 9.9}, {"a": 9.95}]), has_settled([{"a": 10.0}, {"a": 9.85}, {"a": 9.7}])
        (True, False)
    """
    if len(history) <= patience:
        return False
    *before, now = history[-patience - 1 :]
    return all(_change(one, now) < tolerance for one in before)


def _change(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Return the median relative change of the layers that both have; infinite if there are none."""
    return median([_relative(one, now[name]) for name, one in before.items() if name in now] or [inf])


def _relative(before: float, now: float) -> float:
    if before == now:
        return 0.0
    change = abs(now - before) / before if before else inf
    return change if isfinite(change) else inf
