"""Overrides: what some layers become whatever the others do.

``{"layer3.*": {"keep_ratio": 0.5}, "head": {"rank": 32}, "stem": "dense"}``: a pattern of layers
(:mod:`lr_callback.model.patterns`) and what holds for each of them. ``dense``: it stays as it is. ``keep_ratio``: the
form of the smallest error that costs at most this fraction of the layer, of a budget in several units in the first in
which the layer costs anything. ``rank``: this form, of one slice in the first folding of the method unless
``num_slices`` and ``folding`` say more. The others share what is left of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import floor, isfinite
from typing import Any, cast

import torch
from torch import nn

from lr_callback.common.table import listed
from lr_callback.common.written import is_number
from lr_callback.decisions.candidates import Frontier, LayerCandidates, frontier, paid_in
from lr_callback.decisions.costs import LayerCost
from lr_callback.decisions.methods import ALDS, Choice, Method
from lr_callback.decisions.methods.alds import Error
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.model.find import ALL_ZERO, Found, no_match
from lr_callback.model.patterns import check_place, meant

_FORMS = "'dense', {'keep_ratio': 0.5} or {'rank': 32, 'num_slices': 4, 'folding': 'kernel_in_encoder'}"


@dataclass(frozen=True)
class Override:
    """What a layer becomes.

    Args:
        keep_ratio: fraction of its own dense cost, in (0, 1], of several units in the first in which it costs anything;
            None: its form is given.
        rank: singular values for each slice; None: the layer has a fraction, or stays dense.
        num_slices: of that form.
        folding: of that form; None: the method's first.
        pattern: by which it was asked for.
    """

    keep_ratio: float | None = None
    rank: int | None = None
    num_slices: int = 1
    folding: str | None = None
    pattern: str = field(default="", compare=False)

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays as it is."""
        return self.keep_ratio is None and self.rank is None

    def method(self, method: Method) -> Method:
        """Return what computes the candidates of the layer: of a form that is given, only those."""
        if self.rank is None:
            return method
        foldings, error = (self.folding or method.foldings[0],), cast("Error", method.error)
        return ALDS(error, foldings=foldings, slices=(self.num_slices,), shrinkage=method.shrinkage)

    def choose(self, name: str, layer: LayerCandidates, rank_multiple: int = 1, known: bool = True) -> Choice:
        """Return the choice of the layer.

        Args:
            name: of the layer.
            layer: its candidates, by :meth:`method`.
            rank_multiple: that the rank must be a multiple of, where it is not given.
            known: whether the errors are; if not, of a fraction it is what costs, in each unit, as much as any form
                within it: what is chosen once they are known costs no more.

        Raises:
            ValueError: If there is no such form, or none that is as small.
        """
        if self.keep_ratio is None:
            return self._form(name, layer)
        paid = _in_its_own_unit(layer)
        edge, most = frontier(paid, rank_multiple), floor(self.keep_ratio * paid.dense_cost)
        if not known:
            fits = most >= paid.dense_cost
            return None if fits else _dearest(layer, paid, rank_multiple, most) or self._refuse(name, paid, edge)
        fitting = [choice for choice, cost in zip(edge.choices, edge.costs, strict=True) if cost <= most]
        return _as_in(layer, paid, fitting[-1]) if fitting else self._refuse(name, paid, edge)

    def _refuse(self, name: str, layer: LayerCandidates, edge: Frontier) -> Choice:
        raise ValueError(
            f"`overrides`: {name} cannot be as small as keep_ratio={self.keep_ratio:g}; its smallest form takes "
            f"{edge.costs[0] / layer.dense_cost:.4f} of it."
        )

    def _form(self, name: str, layer: LayerCandidates) -> Choice:
        (candidate,) = layer.candidates
        assert self.rank is not None
        if self.rank > candidate.last:
            raise ValueError(
                f"`overrides`: {name} with {self.num_slices} slice(s) of rank {self.rank} costs no less than the dense "
                f"layer; the largest rank that does is {candidate.last}."
            )
        return candidate, self.rank


def read_overrides(overrides: object) -> dict[str, Override]:
    """Return pattern -> what its layers become.

    Args:
        overrides: see above; None: none.

    Raises:
        TypeError: If it is no mapping from patterns.
        ValueError: If a value is none of the forms, or out of range.

    Example::

        >>> read_overrides({"head": {"rank": 8}, "stem": "dense"})["head"].rank
        8
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping) or not all(isinstance(pattern, str) for pattern in overrides):
        raise TypeError(f"`overrides` must map patterns of layers to {_FORMS}, got {overrides!r}.")
    for pattern in overrides:
        check_place("overrides", pattern)
    return {pattern: _read(pattern, value) for pattern, value in overrides.items()}


def _read(pattern: str, value: object) -> Override:
    if value == "dense":
        return Override()
    keys = {key for key, one in value.items() if one is not None} if isinstance(value, Mapping) else set()
    if not isinstance(value, Mapping) or not (
        keys == {"keep_ratio"} or "rank" in keys <= {"rank", "num_slices", "folding"}
    ):
        raise ValueError(f"`overrides`, {pattern!r}: must be {_FORMS}, got {value!r}.")
    given: dict[str, Any] = {key: value[key] for key in keys}
    for key in keys & {"rank", "num_slices"}:
        if type(given[key]) is not int or given[key] < 1:
            raise ValueError(f"`overrides`, {pattern!r}: `{key}` must be a whole number from 1, got {given[key]!r}.")
    ratio = given.get("keep_ratio", 1)
    if not is_number(ratio) or not 0 < ratio <= 1:
        raise ValueError(f"`overrides`, {pattern!r}: `keep_ratio` must be a number in (0, 1], got {ratio!r}.")
    folding = given.get("folding", "kernel_in_encoder")
    if not isinstance(folding, str) or folding not in FOLDINGS:
        raise ValueError(
            f"`overrides`, {pattern!r}: `folding` must be one of {list(FOLDINGS)}, got {given['folding']!r}."
        )
    return Override(**given)


def overridden(overrides: Mapping[str, Override], model: nn.Module, found: Found) -> dict[str, Override]:
    """Return layer name -> what it becomes; move those that stay dense to the skipped ones.

    Args:
        overrides: from :func:`read_overrides`.
        model: whose layers they are.
        found: what can be factorized.

    Raises:
        ValueError: If a pattern matches no layer, or none that can be factorized; or two say different things of one.
    """
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in [*found.layers, *found.skipped]}
    chosen: dict[str, tuple[str, Override]] = {}
    for pattern, override in overrides.items():
        names = meant(pattern, layers, found.able)
        if not names:
            raise ValueError(no_match("overrides", pattern, layers))
        _check_able(pattern, override, names, found)
        for name in sorted(names & set(found.layers)):
            other, before = chosen.setdefault(name, (pattern, replace(override, pattern=pattern)))
            if before != override:
                raise ValueError(
                    f"`overrides` say different things of {name}: {other!r} and {pattern!r} both match it; let only "
                    "one of them do so."
                )
    for name, (_, override) in chosen.items():
        if override.is_dense:
            found.skipped[name] = "stays dense by `overrides`"
            del found.layers[name]
    return {name: override for name, (_, override) in chosen.items() if not override.is_dense}


def pinned(
    overrides: Mapping[str, Override],
    layers: Mapping[str, LayerCandidates],
    costs: Mapping[str, LayerCost],
    skipped: Mapping[str, str],
    rank_multiple: int,
    known: bool,
) -> dict[str, Choice]:
    """Return the choices of the layers that overrides are for; those too small for any form are left to the rest.

    Args:
        overrides: from :func:`overridden`.
        layers: the candidates of all layers.
        costs: of all layers.
        skipped: name of a layer that is left out -> why.
        rank_multiple: of the method.
        known: whether the errors are.

    Raises:
        ValueError: If there is no such form of a layer, or of none that a pattern matches; or a layer was left out.
    """
    for name, override in overrides.items():
        if name not in layers and skipped.get(name) != ALL_ZERO:
            raise ValueError(f"`overrides`: {override.pattern!r} is for {name}, which is left out: {skipped[name]}.")
        if name in layers and override.num_slices not in costs[name].geometry.slice_counts():
            raise ValueError(
                f"`overrides`: {name} cannot have {override.num_slices} slice(s): they must divide its input channels, "
                f"by {costs[name].geometry.slice_counts()}."
            )
    able = {name: override for name, override in overrides.items() if name in layers and layers[name].candidates}
    for pattern in {override.pattern for override in overrides.values()} - {one.pattern for one in able.values()}:
        names = [name for name, one in overrides.items() if one.pattern == pattern and name in layers]
        if names and any(overrides[name].keep_ratio != 1 for name in names):
            raise ValueError(f"`overrides`: {pattern!r}: no rank of {listed(names)} costs less than the dense layer.")
    return {name: override.choose(name, layers[name], rank_multiple, known) for name, override in able.items()}


def _in_its_own_unit(layer: LayerCandidates) -> LayerCandidates:
    """Return a layer that costs nothing in the first unit, whatever it becomes, with its costs in the next it saves in.

    So is a layer that a run does not call, where multiply-adds are the first of several units.
    """
    if layer.dense_cost > 0:
        return layer
    saved_in = (
        unit
        for unit, dense in layer.others.items()
        if any(int(one.others[unit][1]) < dense for one in layer.candidates)
    )
    unit = next(saved_in, None)
    return layer if unit is None else paid_in(unit, layer)


def _as_in(layer: LayerCandidates, paid: LayerCandidates, choice: Choice) -> Choice:
    """Return the choice of a layer that is one of the same layer with its costs in another unit."""
    if choice is None:
        return None
    ((own, _),) = [pair for pair in zip(layer.candidates, paid.candidates, strict=True) if pair[1] is choice[0]]
    return own, choice[1]


def _dearest(layer: LayerCandidates, paid: LayerCandidates, rank_multiple: int, most: int) -> Choice:
    """Return what costs in each unit as much as the dearest form in it of those within a bound; None: there is none.

    Args:
        layer: its candidates.
        paid: the same, with its costs in the unit of the bound.
        rank_multiple: that the rank must be a multiple of.
        most: the bound.
    """
    forms = [
        (candidate, rank)
        for candidate, priced in zip(layer.candidates, paid.candidates, strict=True)
        for rank in range(rank_multiple, candidate.last + 1, rank_multiple)
        if priced.cost(rank) <= most and isfinite(candidate.errors[rank])
    ]
    if not forms:
        return None
    own = max(candidate.cost(rank) for candidate, rank in forms)
    others = {unit: max(int(candidate.others[unit][rank]) for candidate, rank in forms) for unit in layer.others}
    dearest = {unit: torch.tensor([0, cost]) for unit, cost in others.items()}
    return replace(forms[0][0], errors=torch.tensor([1.0, 0.0]), costs=torch.tensor([0, own]), others=dearest), 1


def _check_able(pattern: str, override: Override, names: set[str], found: Found) -> None:
    left_out = sorted(names & set(found.skipped))
    if left_out and not override.is_dense and not names & set(found.layers):
        reasons = "; ".join(f"{name}: {found.skipped[name]}" for name in left_out[:3])
        raise ValueError(f"`overrides`: no layer that {pattern!r} matches can be factorized: {reasons}.")
