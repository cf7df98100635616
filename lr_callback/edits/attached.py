"""Attached: what users put on a weight itself, and what becomes of it when others take the weight's place.

Attributes such as ``weight._no_weight_decay = True`` are copied. A hook on the gradient of a weight cannot follow: it
was written for that gradient, and nobody knows what it is to do with those of two factors. (Where a hook waits for the
accumulated gradient the layer stays dense: it may be what trains the weight.)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

_PLAIN = (bool, int, float, str, bytes, type(None))
_OF_TORCH = ("_dynamo", "_is_param")
"""How names begin that torch itself gives to parameters."""


def copy_attributes(old: nn.Parameter, new: Iterable[nn.Parameter]) -> None:
    """Give new parameters the attributes of the one in whose place they are: plain values, and lists or dicts of such.

    Args:
        old: perhaps with attributes.
        new: each gets copies.

    Example::

        >>> import torch
        >>> weight, factor = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        >>> weight._no_weight_decay = True
        >>> copy_attributes(weight, [factor])
        >>> factor._no_weight_decay
        True
    """
    kept = {name: value for name, value in _attributes(old).items() if _is_plain(value)}
    for parameter in new:
        vars(parameter).update(copy.deepcopy(kept))


def not_copied(parameter: nn.Parameter) -> list[str]:
    """Return the names of the attributes of a parameter that :func:`copy_attributes` leaves behind.

    Example::

        >>> import torch
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.lr_scale, weight.owner = 0.1, object()
        >>> not_copied(weight)
        ['owner']
    """
    return [name for name, value in _attributes(parameter).items() if not _is_plain(value)]


def warn_of_attached(weights: Mapping[str, Iterable[nn.Parameter]]) -> None:
    """Warn of what is attached to weights and does not follow when they are replaced.

    Args:
        weights: name of a layer -> those of its weights that others are to take the place of.
    """
    hooked = [name for name, of in weights.items() if any(one._backward_hooks for one in of)]
    left = {
        f"{name} ({attribute})": None for name, of in weights.items() for one in of for attribute in not_copied(one)
    }
    if hooked:
        warnings.warn(
            f"A hook on the gradient of a weight goes with it when the layer is factorized, found some at "
            f"{_some(hooked)}. Register it again on the new weights, `layer.encoder.weight` and `layer.decoder.weight` "
            "(with a callback that comes after this one, in `on_train_epoch_start`), or name the layers in `exclude`.",
            stacklevel=2,
        )
    if left:
        warnings.warn(
            f"Attributes of a weight that are more than numbers, texts and lists or dicts of these are not copied to "
            f"the weights in its place, found {_some(list(left))}. Set them again on `layer.encoder.weight` and "
            "`layer.decoder.weight`, or name the layers in `exclude`.",
            stacklevel=2,
        )


def _attributes(parameter: nn.Parameter) -> dict[str, object]:
    return {name: value for name, value in vars(parameter).items() if not name.startswith(_OF_TORCH)}


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
