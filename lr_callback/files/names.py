"""Names: the entries of a state dict under the names that a model has for them.

A file may have been written from a larger module (its names have a prefix), from a module that ``torch.compile`` had
wrapped (``_orig_mod.`` in its names), or without the second name of a tensor that two names share. None of these says
anything about the tensors: each entry is matched with the model's name for it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lr_callback.common.table import readable
from lr_callback.layers import dense_bias

Value = TypeVar("Value")
Layers = Mapping[nn.Module, Sequence[str]]
"""Each layer that can be factorized -> all of its names in the model."""

ENTRIES = ("weight", "bias", "encoder.weight", "decoder.weight", "decoder.bias")
"""Names of what a dense or a factorized layer holds."""

Forms = tuple[str, ...]
"""Names of one entry: its own, or those of a layer's bias in a dense and in a factorized file."""


@dataclass(frozen=True)
class Naming:
    """How a model names what a state dict has, found by :func:`naming`.

    Args:
        prefix: of the model's names in the state dict, with a dot; nothing if there is none.
        modules: name of each module, with a dot and without what ``torch.compile`` puts into it -> the model's name.
        tied: groups of what is one tensor in the model, each by its name; a layer's bias by two, dense and factorized.
        shared: groups of names that are of one layer in the model, which may have another structure in the state dict.
    """

    prefix: str
    modules: Mapping[str, str]
    tied: Sequence[Sequence[Forms]]
    shared: Sequence[Sequence[str]]

    def own(self, name: str) -> str | None:
        """Return the model's name for an entry or, with a dot, for a module; None if it is of another part."""
        short = readable(name)
        if not short.startswith(self.prefix):
            return None
        inner = short.removeprefix(self.prefix)
        held = inner
        while held not in self.modules:
            held = _parent(held)
        return self.modules[held] + inner.removeprefix(held)

    def entries(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Return the entries that are of the model, under all of the names that it has for them.

        Raises:
            ValueError: If two entries are meant for one name.
        """
        meant: dict[str, str] = {}
        for name in given:
            own = self.own(name)
            if own is not None and meant.setdefault(own, name) != name:
                raise ValueError(
                    f"`source`: it must have one entry for {own}, found {meant[own]} and {name}; `torch.compile` makes "
                    "one name of the other, a file has either. Take one of them out. Nothing was changed."
                )
        state = {own: given[name] for own, name in meant.items()}
        self._fill(state)
        return state

    def _fill(self, state: dict[str, Value]) -> None:
        """Give entries of one layer or of one tensor all of their names."""
        for names in self.shared:
            held = {
                name: {one: state[f"{name}.{one}"] for one in ENTRIES if f"{name}.{one}" in state} for name in names
            }
            first = next((entries for entries in held.values() if entries), {})
            missing = (name for name in names if not held[name])
            state.update({f"{name}.{inner}": value for name in missing for inner, value in first.items()})
        for group in self.tied:
            there = [name for forms in group for name in forms if name in state]
            lacking = [forms for forms in group if there and state.keys().isdisjoint(forms)]
            state.update({_form_in(state, forms): state[there[0]] for forms in lacking})

    def groups(self, state: Collection[str]) -> Iterator[list[str]]:
        """Yield which entries are of one tensor in the model."""
        for group in self.tied:
            yield [name for forms in group for name in forms if name in state]
        for names in self.shared:
            for inner in ENTRIES:
                yield [f"{name}.{inner}" for name in names if f"{name}.{inner}" in state]

    def of_modules(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Return what is noted of modules, under the model's names for them."""
        renamed = ((self.own(f"{name}." if name else ""), value) for name, value in given.items())
        return {name.removesuffix("."): value for name, value in renamed if name is not None}


def naming(model: nn.Module, layers: Layers, given: Collection[str]) -> Naming:
    """Match the names of a state dict with those of a model.

    Args:
        model: dense or factorized, with values.
        layers: of the model.
        given: names of a state dict that was written from such a model, or from one that holds it.

    Example::

        >>> model = torch.compile(nn.Sequential(nn.Linear(2, 2, bias=False)))
        >>> naming(model, {}, ["network.0.weight", "loss.weight"]).entries({"network.0.weight": 1, "loss.weight": 2})
        {'_orig_mod.0.weight': 1}
    """
    shared = [layer for layer in layers.values() if len(layer) > 1]
    weights = [one for one in ENTRIES if one.endswith("weight")]
    tied = _tied(model, layers, {f"{name}.{one}" for layer in shared for name in layer for one in weights})
    names = [f"{name}." if name else "" for name, _ in model.named_modules(remove_duplicate=False)]
    prefix = _prefix(_possible_names(model, layers, tied), frozenset(map(readable, given)))
    return Naming(prefix, {readable(name): name for name in names}, tied, shared)


def _parent(name: str) -> str:
    """Return the name, with a dot, of the module that holds an entry or another module."""
    return name[: name.removesuffix(".").rfind(".") + 1]


def _prefix(wanted: Sequence[Collection[str]], given: Collection[str]) -> str:
    """Return the name under which a larger module held this model, with a dot; nothing if there is no such name."""

    def fits(prefix: str) -> bool:
        return all(any(prefix + name in given for name in names) for names in wanted)

    if not wanted or fits(""):
        return ""
    prefixes = {key[: -len(name)] for key in given for name in wanted[0] if key.endswith(f".{name}")}
    fitting = [prefix for prefix in sorted(prefixes) if fits(prefix)]
    return fitting[0] if len(fitting) == 1 else ""


def _possible_names(model: nn.Module, layers: Layers, tied: Iterable[Sequence[Forms]]) -> list[Collection[str]]:
    """Return, for each tensor of a model, the names that it may have in dense and in factorized files."""
    entries: dict[str, tuple[str, ...]] = {name: (name,) for name in model.state_dict()}
    for layer, names in layers.items():
        for name in (f"{name}.{inner}" for name in names for inner in ENTRIES):
            entries.pop(name, None)
        for inner in ("weight", "bias") if dense_bias(layer) is not None else ("weight",):
            forms = (inner, f"{'encoder' if inner == 'weight' else 'decoder'}.{inner}")
            entries[f"{names[0]}.{inner}"] = tuple(f"{name}.{form}" for name in names for form in forms)
    for group in tied:
        there = [name for name, *_ in group if name in entries]
        if there:
            entries[there[0]] = tuple(one for name in there for one in entries.pop(name))
    return [frozenset(map(readable, names)) for names in entries.values()]


def _tied(model: nn.Module, layers: Layers, apart: Collection[str]) -> list[Sequence[Forms]]:
    """Return groups of what is one tensor, but for some names, whose layers come back as a whole."""
    biases = (_forms_of_bias(name) for names in layers.values() for name in names)
    forms = {name: both for both in biases for name in both}
    groups: dict[Hashable, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in apart and not is_extra(name):  # that of two modules may be one object, and is not tied for it
            groups.setdefault(_identity(value), []).append(name)
    return [[forms.get(name, (name,)) for name in names] for names in groups.values() if len(names) > 1]


def is_extra(name: str) -> bool:
    """Return whether an entry is what a module's ``get_extra_state`` made: anything, of any size."""
    return name.rpartition(".")[2] == "_extra_state"


def _forms_of_bias(layer: str) -> Forms:
    return f"{layer}.bias", f"{layer}.decoder.bias"


def _form_in(state: Collection[str], forms: Forms) -> str:
    """Return the name of an entry in the structure that a state dict has for its layer."""
    return forms[-1] if f"{forms[-1].removesuffix('decoder.bias')}encoder.weight" in state else forms[0]


def _identity(value: object) -> Hashable:
    """Return what is the same for two entries of a state dict that are one tensor, or lie in the same memory alike."""
    if type(value) not in (Tensor, nn.Parameter):
        return id(value)
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.device.type == "meta" or not value.numel():
        return id(value)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
