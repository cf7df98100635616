"""Patterns: which layers of a model a user means, by name, by type or by place.

``layer1.*`` is a glob pattern of names. ``type:Conv2d`` is one of types, of the class alone or in full, such as
``type:torch.nn.Conv2d``; a factorized layer counts as of the type that it stands for. ``place:first`` and
``place:last`` are the first and the last layer that can be factorized, embeddings aside, in the order in which the
model holds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lr_callback.common.table import readable
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import LAYER_TYPES, full_name, layer_type

_TYPE, _PLACE = "type:", "place:"
_PLACES = {"first": 0, "last": -1}


def check_patterns(**arguments: object) -> None:
    """Refuse what are no patterns.

    Args:
        arguments: name of an argument -> its value.

    Raises:
        TypeError: If one is neither None, a string, nor a list or tuple of strings.
        ValueError: If one names a place that there is not.
    """
    for name, value in arguments.items():
        listed = [value] if isinstance(value, str) else [] if value is None else value
        if not (isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)):
            raise TypeError(
                f"`{name}` must be a glob pattern of layer names such as 'layer1.*', or a list of them, got {value!r}."
            )
        for pattern in listed:
            check_place(name, pattern)


def check_place(argument: str, pattern: str) -> None:
    """Refuse a pattern of a place that there is not.

    Raises:
        ValueError: If it is one.
    """
    if pattern.startswith(_PLACE) and pattern.removeprefix(_PLACE) not in _PLACES:
        raise ValueError(f"`{argument}`: a place must be 'place:first' or 'place:last', got {pattern!r}.")


def as_patterns(patterns: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return one pattern, or several, as a tuple; None: there are none."""
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def meant(pattern: str, layers: Mapping[str, nn.Module], able: Sequence[str]) -> set[str]:
    """Return the names of the layers that a pattern is for.

    Args:
        pattern: see above.
        layers: name -> layer, of all layers with a weight.
        able: the names of those that can be factorized, in the order in which the model holds them.

    Example::

        >>> layers = {"body.0": nn.Conv2d(3, 8, 3), "body.1": nn.Linear(8, 8), "head": nn.Linear(8, 2)}
        >>> [sorted(meant(one, layers, list(layers))) for one in ("body.*", "type:Linear", "place:last")]
        [['body.0', 'body.1'], ['body.1', 'head'], ['head']]
    """
    if pattern.startswith(_PLACE):
        at = _PLACES[pattern.removeprefix(_PLACE)]
        listed = [name for name in able if _counts(layers[name])]
        return {listed[at]} if listed else set()
    if pattern.startswith(_TYPE):
        wanted = pattern.removeprefix(_TYPE)
        return {name for name, layer in layers.items() if any(fnmatchcase(one, wanted) for one in _types(layer))}
    # Names as they are, and without what torch.compile puts into them.
    return {name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(readable(name), pattern)}


def _counts(layer: nn.Module) -> bool:
    """Return whether a layer is one of which there is a first: embeddings, which are to be asked for, are not."""
    kind = layer_type(layer)
    return kind is not None and kind.only_if_asked is None


def _types(layer: nn.Module) -> list[str]:
    """Return the names of the type of a layer, or of those that a factorized one may stand for: in full, and alone."""
    kind = type(layer)
    full = [name for name, row in LAYER_TYPES.items() if row is kind] if isinstance(layer, FactorizedLayer) else []
    names = full or [full_name(kind)]
    usual = [re.sub(r"^torch\.nn\.modules\.\w+\.", "torch.nn.", name) for name in names]
    return [*names, *usual, *(name.rpartition(".")[2] for name in names)]
