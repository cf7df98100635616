"""Holders: what besides its place in the model has hold of a layer or of its weight, and would keep the dense one.

A layer is replaced where modules hold it as a child. A plain list of layers, a closure or another parameter on the same
memory is not such a place: it would go on with the dense layer, and nothing would tell.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, NoneType
from weakref import ReferenceType

import torch
from torch import Tensor, nn

_CHILDREN = frozenset({"_modules", "_parameters", "_buffers"})
_RECORDS = frozenset({"_hparams", "_hparams_initial"})
"""Where Lightning notes the arguments that a module was built with; nothing is called from there."""

_IGNORED = _CHILDREN | _RECORDS
_PLAIN = frozenset({bool, int, float, str, NoneType})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, deque})
_HOSTS = frozenset({"builtins", "lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics"})
_DEPTH = 8
_MOST = 100_000
_LONGEST = 10_000
"""Longer containers are data, and so is what comes after so many objects."""


def held_elsewhere(model: nn.Module, wanted: Collection[nn.Module | Tensor]) -> dict[int, str]:
    """Find what plain attributes of a model's modules have hold of.

    Looked through are containers, partials, methods, hooks, what functions close over, weak references, and the
    attributes of other objects, also in slots and of classes; not those of torch and Lightning: an optimizer follows a
    surgery, a Trainer holds the model. What is held outside of the model is not found. A view of a weight counts as it.

    Args:
        model: whose modules' attributes are looked through.
        wanted: layers and parameters.

    Returns:
        The id of each that was found -> where.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> model.layers = [model[1]]
        >>> list(held_elsewhere(model, list(model)).values())
        ['the attribute layers of the model']
    """
    ids = frozenset(map(id, wanted))
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for weight in (one for one in wanted if isinstance(one, Tensor)):
        for _, start, end in _span(weight):
            spans.setdefault(_storage(weight), []).append((start, end, id(weight)))
    found: dict[int, str] = {}
    seen: dict[int, int] = {}
    for name, module in model.named_modules():
        for attribute, value in _attributes(module):
            for one in _reached(value, seen, _DEPTH):
                for held in _meant(one, ids, spans):
                    found.setdefault(held, f"the attribute {attribute} of {name or 'the model'}")
    return found


def _meant(value: object, ids: Collection[int], spans: Mapping[int, Iterable[tuple[int, int, int]]]) -> Iterator[int]:
    """Yield which of the wanted a value is, or is a view of; ``spans`` are theirs in each storage."""
    if id(value) in ids:
        yield id(value)
    elif isinstance(value, Tensor):
        for _, start, end in _span(value):
            near = spans.get(_storage(value), ())
            yield from (wanted for first, last, wanted in near if start < last and first < end)


def _storage(tensor: Tensor) -> int:
    return int(Tensor.untyped_storage(tensor).data_ptr())


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what a module has besides its children, also in slots, and what a user's class of it holds for all."""
    yield from _own(module).items()
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] not in _HOSTS:
            held = (nn.Module, Tensor, list, tuple, dict, deque)
            yield from ((name, one) for name, one in vars(base).items() if isinstance(one, held))


def _own(value: object) -> dict[str, object]:
    """Return an object's attributes, also in slots; what ``functools.wraps`` copied of a module has its children."""
    own = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        own |= {name: _slot(value, name) for name in _names(vars(base).get("__slots__", ())) if name != "__dict__"}
    return {name: one for name, one in own.items() if name not in _IGNORED and not _is_nothing(one)}


def _slot(value: object, name: str) -> object:
    """Return what is in a slot, past a ``__getattr__`` of the object's own; None if nothing is."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return None


def _is_nothing(value: object) -> bool:
    """Return whether a value has hold of nothing: most of what a module has are hooks that there are none of."""
    kind = type(value)
    return kind in _PLAIN or (kind in _CONTAINERS and not value)


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _reached(value: object, seen: dict[int, int], depth: int) -> Iterator[object]:
    """Yield the modules and tensors that a value leads to; a module is not entered, its children stay its own.

    What was looked into is looked into again where more steps are left than there were: some of what it leads to was
    too far away.
    """
    if isinstance(value, (nn.Module, Tensor)):
        yield value
        return
    inner = _inside(value)
    if inner is None or depth <= seen.get(id(value), 0) or len(seen) > _MOST:
        return
    seen[id(value)] = depth
    for one in inner:
        yield from _reached(one, seen, depth - 1)


def _inside(value: object) -> Iterable[object] | None:
    """Return what a value has hold of, None if it is not of a kind that is looked through."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value if len(value) <= _LONGEST else None
    if isinstance(value, dict):
        return [*value.keys(), *value.values()] if len(value) <= _LONGEST else None
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords, *_own(value).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return [*_cells(value), value.__defaults__, value.__kwdefaults__, *_own(value).values()]
    if isinstance(value, ReferenceType):
        return [value()]
    return _own(value).values() if _is_looked_into(value) else None


def _is_looked_into(value: object) -> bool:
    """Return whether an object is of a user's or another package's class, and not one that follows by itself."""
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__ if base is not object}
    return not packages & _HOSTS and not isinstance(value, type)


def _cells(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue


def owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return the id of each parameter of a model -> the names of the modules that have it; of a tied one several."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def shared_memory(model: nn.Module) -> dict[int, list[str]]:
    """Find the different parameters and buffers of a model that lie in the same memory.

    Returns:
        The id of each of them -> the names of the others.

    Example::

        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        >>> model[1].weight.data = model[0].weight.data
        >>> list(shared_memory(model).values())
        [['1.weight'], ['0.weight']]
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    spans = sorted((*span, number) for number, (_, tensor) in enumerate(named) for span in _span(tensor))
    others: dict[int, list[str]] = {}
    for place, (device, _, end, number) in enumerate(spans):
        for later in range(place + 1, len(spans)):
            device_of_later, start, _, following = spans[later]
            if device_of_later != device or start >= end:
                break
            for one, other in ((number, following), (following, number)):
                others.setdefault(id(named[one][1]), []).append(named[other][0])
    return others


def _span(tensor: Tensor) -> Iterator[tuple[str, int, int]]:
    """Yield the device, first and last byte of a plain tensor; nothing for one that has no memory of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type == "meta":
        return
    if tensor.numel():
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()
