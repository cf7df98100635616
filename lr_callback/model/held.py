"""Held: how many parameters and bytes a model has, as it stands and with all layers dense."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from lr_callback.layers.layer_types import saved_cost
from lr_callback.model.find import replaceable_in


def held_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model as it is; a shared parameter counts once.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).
    """
    return sum(parameter.numel() for parameter in _initialised(model))


def dense_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model with all layers dense; a shared parameter counts once.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).
    """
    return held_parameters(model) + sum(saved_cost(layer) for layer in replaceable_in(model).values())


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and persistent buffers, as it is; a shared one counts once.

    These are what a state dict holds; a file of it is larger by its header. Each entry counts by its dtype, those of a
    sparse tensor all of them.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).

    Example::

        >>> held_bytes(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))  # with a count of batches, 8 bytes
        424
    """
    buffers = {
        id(value): value
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    return sum(value.numel() * value.element_size() for value in [*_initialised(model), *buffers.values()])


def dense_bytes(model: nn.Module) -> int:
    """Return what :func:`held_bytes` does, of the model with all layers dense; raises as it does."""
    return held_bytes(model) + sum(saved_cost(layer, in_bytes=True) for layer in replaceable_in(model).values())


def _initialised(model: nn.Module) -> list[nn.Parameter]:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ValueError(f"{name}: it is not initialised yet and cannot be counted; run one batch first.")
    return list(model.parameters())
