"""Kept over dense cost, of numbers, an allocation or a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.decisions.allocation import Allocation
from lr_callback.model.held import dense_parameters, held_parameters

_LARGEST = 2**63 - 1
"""Of torch's whole numbers, in which the metric adds up."""


def kept_cost(kept: int | Allocation | nn.Module, dense: int | nn.Module | None = None) -> Tensor:
    """Return the fraction of a dense model's cost that is kept.

    Args:
        kept: cost of the model as it is, a whole number in any unit, at least 0; or the model, whose parameters count;
            or an allocation, which knows both costs.
        dense: cost of the dense model in the same unit, above 0; or the dense model, whose parameters count. None: of a
            model the parameters that it has with all layers dense, of an allocation its dense cost.

    Returns:
        A number from 0, and at most 1 where the model has become smaller.

    Raises:
        TypeError: If an argument is something else, or does not go with the other.
        ValueError: If a cost is out of range, or a parameter is not initialised yet (a lazy layer).

    Example::

        >>> from torch import nn
        >>> from lr_callback import allocate, factorize_
        >>> from lr_callback.metrics.functional import kept_cost
        >>> kept_cost(30, 120)
        tensor(0.2500)
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> allocation = allocate(model, 0.5)
        >>> report = factorize_(model, allocation)
        >>> bool(kept_cost(model) == kept_cost(allocation) <= 0.5)
        True
    """
    own, whole = costs(kept, dense)
    return torch.tensor(own / whole)


def costs(kept: object, dense: object = None) -> tuple[int, int]:
    """Return what is kept and the dense cost, as numbers; arguments and errors as of :func:`kept_cost`."""
    if isinstance(kept, Allocation):
        if dense is not None:
            raise TypeError(f"KeptCost: an Allocation knows its dense cost: leave out `dense`, got {_told(dense)}.")
        return _checked(kept.cost, kept.dense_cost)
    if dense is None and isinstance(kept, nn.Module):
        return _checked(_cost(kept, "kept"), dense_parameters(kept))
    return _checked(_cost(kept, "kept"), _cost(dense, "dense"))


def _cost(given: object, name: str) -> int:
    if isinstance(given, nn.Module):
        return held_parameters(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    raise TypeError(
        f"KeptCost: `{name}` must be a whole number or a model"
        f"{', or an Allocation alone' if name == 'kept' else ', whose cost is compared with'}, got {_told(given)}."
    )


def _checked(kept: int, dense: int) -> tuple[int, int]:
    if dense <= 0 or kept < 0:
        raise ValueError(f"KeptCost: `dense` must be above 0 and `kept` at least 0, got {dense} and {kept}.")
    if max(kept, dense) > _LARGEST:
        raise ValueError(f"KeptCost: costs must be below 2 ** 63, choose a larger unit; got {dense} and {kept}.")
    return kept, dense


def _told(given: object) -> str:
    plain = given is None or isinstance(given, (int, float, str))
    return repr(given) if plain else f"an object of the type {type(given).__name__}"
