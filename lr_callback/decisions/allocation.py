"""Allocation: what each layer becomes, as plain data that travels between processes, logs, files and people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from lr_callback.common.table import printable, wrap
from lr_callback.common.written import Kind, check_fields, describe, is_plain, read_json
from lr_callback.decisions.costs import COSTS, amount, is_unit
from lr_callback.decisions.curves import Curves
from lr_callback.decisions.factorization import Factorization, Spending, read_layer, read_shape, read_spending
from lr_callback.decisions.printed import reasons_of, table_of

VERSION = 1
"""Version of the written form; a file of a newer version is refused."""


@dataclass(frozen=True)
class Allocation:
    """What all layers become under one budget. Printed, it is a table.

    Args:
        layers: layer name -> its factorization; None: the layer stays dense.
        skipped: name of a layer that was left out -> why.
        shapes: layer name -> shape of its dense weight, ``(F, C / groups, *kernel)`` for every type.
        cost: of the whole model as allocated, what cannot be factorized included.
        dense_cost: of the whole model, all layers dense.
        budget: what ``cost`` had to stay within.
        keep_ratio: the fraction that was asked for, in (0, 1].
        unit: of all costs, one of :data:`~lr_callback.decisions.costs.COSTS`, or the path of a user's function.
        error: name of the error measure.
        method: name and arguments of the method.
        gap: what the method's objective would be at its smallest is at least ``1 - gap`` times what it is here; 0 where
            it is exact, or the method has none.
        weights: layer name -> what its error was multiplied with among the others; empty: all count the same.
        others: unit -> what is spent in it, where there were budgets in several units.
        max_error: that no layer errs by more than, where that was asked for; the budget is then what it takes.
        overridden: names of the layers that an override is for, whatever the others are.
        sampled: its curves, or what makes them, the analysis that it was made of; None: neither is at hand. It is not
            written, nor compared.
    """

    layers: Mapping[str, Factorization | None]
    skipped: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    cost: int
    dense_cost: int
    budget: int
    keep_ratio: float
    unit: str = "parameters"
    error: str = "slice"
    method: Mapping[str, Any] = field(default_factory=dict)
    gap: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Spending] = field(default_factory=dict)
    max_error: float | None = None
    overridden: tuple[str, ...] = ()
    sampled: Curves | Callable[[Allocation], Curves] | None = field(default=None, repr=False, compare=False)

    def __copy__(self) -> Allocation:
        """Return a copy; in this process it keeps its analysis, as :meth:`__deepcopy__` does."""
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Allocation:
        """Return a copy that shares no data but the analysis, which nothing changes."""
        return replace(self, **{name: deepcopy(value, memo) for name, value in vars(self).items() if name != "sampled"})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out an analysis: it may hold functions of a user, which do not travel."""
        return {**vars(self), "sampled": self.sampled if isinstance(self.sampled, Curves) else None}

    @property
    def worst_error(self) -> float:
        """Largest relative error of a layer; 0 if all stay dense."""
        return max((layer.relative_error for layer in self.factorized.values()), default=0.0)

    @property
    def mean_error(self) -> float:
        """Mean relative error over all layers, those that stay dense with 0."""
        return sum(layer.relative_error for layer in self.factorized.values()) / max(1, len(self.layers))

    @property
    def factorized(self) -> dict[str, Factorization]:
        """The layers that do not stay dense."""
        return {name: layer for name, layer in self.layers.items() if layer is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the allocation as dicts, lists, strings and numbers (``torch.load(weights_only=True)`` takes it)."""
        written = asdict(replace(self, sampled=None))
        del written["sampled"]
        written["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return {"version": VERSION, **written, "overridden": list(self.overridden)}

    def curves(self) -> Curves:
        """Return what figures draw of it and of the layers it was made for.

        Raises:
            ValueError: If it was read from a file, or came from another process, where its analysis stayed.
        """
        if self.sampled is None:
            raise ValueError(
                "Allocation: its singular values and errors must be at hand to be drawn, and they are not: it was read "
                "from a file, or came from another process. Use `callback.curves` of a run, or "
                "`lr_callback.analyze(model).curves(allocation)` with the model as it was before, and "
                "`analyze(model, method)` where a method was given."
            )
        return self.sampled if isinstance(self.sampled, Curves) else self.sampled(self)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Allocation:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If it is not an allocation, is damaged, or was written by a newer version.
        """
        return _read(written)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the allocation as JSON text, and write it to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Allocation:
        """Read JSON text, or a file of it.

        Args:
            source: the text (it begins with a brace) or a path.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not JSON, or not an allocation.
        """
        return _read(read_json(source, "Allocation"))

    def __str__(self) -> str:
        """Return the table of the layers, why some are dense, overridden or skipped, and the totals, in 80 columns."""
        own = dict.fromkeys(self.overridden, "they are what `overrides` says, whatever the budget")
        reasons = [
            *reasons_of("dense", self._dense_by_choice()),
            *reasons_of("overridden", own),
            *reasons_of("skipped", self.skipped),
        ]
        return "\n".join([table_of(self.layers, self.shapes), *reasons, wrap(printable(self.summary()))])

    def _dense_by_choice(self) -> dict[str, str]:
        """Return why layers stay dense that could be smaller."""
        elsewhere = {*self.overridden, *self.skipped}
        names = [name for name, layer in self.layers.items() if layer is None and name not in elsewhere]
        if self.max_error is not None:
            return dict.fromkeys(names, f"all smaller forms err by more than {self.max_error:g}")
        return dict.fromkeys(names, "within the budget")

    def summary(self) -> str:
        """Return one line: the cost before and after, the budget, the worst error, and a gap if there is one."""
        gap = f", objective proven within {self.gap:.1e} of the smallest" if self.gap else ""
        asked = "" if self.max_error is None else f", at most {self.max_error:g} asked"
        asked += " besides overrides" if self.max_error is not None and self.worst_error > self.max_error else ""
        own = Spending(self.cost, self.dense_cost, self.budget)
        ratio = None if self.max_error is not None else self.keep_ratio
        spent = [_spent(self.unit, own, ratio), *(_spent(unit, one, None) for unit, one in self.others.items())]
        return (
            f"{len(self.factorized):,} of {len(self.layers):,} layers factorized: {', '.join(spent)}, "
            f"worst {self.error} error {self.worst_error:.3f}{asked}{gap}"
        )


def _spent(unit: str, one: Spending, ratio: float | None) -> str:
    """Return what is kept in a unit; where no fraction was asked for, and the budget is not the cost, that of both."""
    asked = one.budget / one.dense_cost if ratio is None and one.budget != one.cost else ratio
    told = "" if asked is None else f", {asked:.1%} asked"
    kept = f"{one.cost / one.dense_cost:.1%} kept"
    return f"{amount(unit, one.dense_cost).split()[0]} -> {amount(unit, one.cost)} ({kept}{told})"


_FIELDS: dict[str, Kind] = {
    "layers": dict,
    "skipped": dict,
    "shapes": dict,
    "cost": int,
    "dense_cost": int,
    "budget": int,
    "keep_ratio": (int, float),
    "unit": str,
    "error": str,
    "method": dict,
    "gap": (int, float),
    "weights": dict,
    "others": dict,
    "max_error": (int, float, type(None)),
    "overridden": list,
}
_LATER: dict[str, Any] = {"gap": 0.0, "weights": {}, "others": {}, "max_error": None, "overridden": []}
"""Fields that files of the same version may lack, and what they are then."""


def _read(written: object) -> Allocation:
    """Check each part of a written allocation, then build it."""
    if not isinstance(written, Mapping) or "version" not in written:
        raise ValueError(
            "Allocation: must be a dict with the keys that `Allocation.to_dict()` writes, among them 'version', "
            f"got {describe(written)}."
        )
    version = written["version"]
    if type(version) is not int or not 1 <= version < 2**63:
        raise ValueError(f"Allocation: `version` must be a whole number from 1, got {describe(version)}.")
    if version > VERSION:
        raise ValueError(
            f"Allocation: version {version} is newer than {VERSION}, the newest that this lr_callback reads; "
            "update lr_callback."
        )
    parts = check_fields({**_LATER, **written}, _FIELDS, "Allocation")
    _check_ranges(parts)
    layers = {name: read_layer(name, layer) for name, layer in parts["layers"].items()}
    shapes = {name: read_shape(name, shape) for name, shape in parts["shapes"].items()}
    if set(shapes) != set(layers):
        raise ValueError(
            f"Allocation: `shapes` must name the same layers as `layers`, they differ in "
            f"{sorted(set(shapes) ^ set(layers))}; the file is damaged, write it again."
        )
    others = {unit: read_spending(unit, one) for unit, one in parts["others"].items()}
    if parts["unit"] in others:
        raise ValueError(f"Allocation: `others` must be of other units than `unit`, found {parts['unit']!r}.")
    own = {"layers": layers, "shapes": shapes, "others": others, "overridden": _read_overridden(parts)}
    return Allocation(**{**parts, **own})


def _read_overridden(parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Check the names of the layers that overrides are for."""
    names = parts["overridden"]
    if not all(isinstance(name, str) and name in parts["layers"] for name in names):
        raise ValueError(
            f"Allocation: `overridden` must be names of its layers, got {describe(names)}; the file is damaged or "
            "foreign."
        )
    return tuple(names)


def _check_ranges(parts: Mapping[str, Any]) -> None:
    """Refuse names, a unit, costs or a ratio that no allocation has."""
    if not all(
        isinstance(name, str) for field_ in ("layers", "skipped", "shapes", "weights") for name in parts[field_]
    ):
        raise ValueError("Allocation: the names of layers must be strings; the file is damaged or foreign.")
    if not all(isinstance(reason, str) for reason in parts["skipped"].values()):
        raise ValueError("Allocation: `skipped` must give each reason as a string; the file is damaged or foreign.")
    _check_method(parts["method"])
    if not is_unit(parts["unit"]):
        raise ValueError(
            f"Allocation: `unit` must be one of {list(COSTS)}, or the path of a function, got {parts['unit']!r}."
        )
    if not 0 < parts["keep_ratio"] <= 1:
        raise ValueError(f"Allocation: `keep_ratio` must be in (0, 1], got {parts['keep_ratio']}.")
    if not 0 <= parts["cost"] <= parts["dense_cost"] or not parts["dense_cost"]:
        raise ValueError(
            f"Allocation: `cost` must be from 0 to `dense_cost`, got {parts['cost']} and {parts['dense_cost']}."
        )
    if not 0 <= parts["gap"] <= 1:
        raise ValueError(f"Allocation: `gap` must be from 0 to 1, got {describe(parts['gap'])}.")
    if not all(type(one) in (int, float) and 0 <= one < inf for one in parts["weights"].values()):
        raise ValueError(f"Allocation: `weights` must be finite numbers from 0, got {describe(parts['weights'])}.")
    if parts["max_error"] is not None and not 0 < parts["max_error"] <= 1:
        raise ValueError(f"Allocation: `max_error` must be in (0, 1], got {describe(parts['max_error'])}.")
    if parts["budget"] < 0:
        raise ValueError(f"Allocation: `budget` must not be negative, got {parts['budget']}.")


def _check_method(method: Mapping[str, Any]) -> None:
    """Refuse what no method writes, and a number that factors are built with and that is out of range."""
    if not is_plain(method):
        raise ValueError(f"Allocation: `method` must hold names, numbers and lists, got {describe(method)}.")
    shrinkage = method.get("shrinkage", 0.0)
    if type(shrinkage) not in (int, float) or not 0 <= shrinkage <= 1:
        raise ValueError(f"Allocation: `shrinkage` of the method must be from 0 to 1, got {describe(shrinkage)}.")
