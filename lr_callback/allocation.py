"""Allocation: what each layer becomes, as plain data that travels between processes, logs, files and people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from lr_callback.costs import COSTS
from lr_callback.folding import FOLDINGS
from lr_callback.table import WIDTH, align, readable, shorten, wrap
from lr_callback.written import Kind, check_fields, describe, is_plain, read_json

VERSION = 1
"""Version of the written form; a file of a newer version is refused."""

_LARGEST_ERROR = 1e6
"""Beyond any error of a layer, which is at most the root of its slices."""

_KERNEL = {
    "kernel_in_encoder": "encoder",
    "depth_in_decoder": "decoder d",
    "height_in_decoder": "decoder h",
    "width_in_decoder": "decoder w",
    "kernel_in_decoder": "decoder",
}


@dataclass(frozen=True)
class Factorization:
    """What one layer becomes.

    Args:
        folding: which kernel axes go to the decoder.
        num_slices: ``k``, equal parts of the input channels of each group.
        rank: singular values kept per slice.
        relative_error: of the layer, in the allocation's measure, 0 to ``sqrt(k)``.
        cost: of the factorized layer, in the allocation's unit.
        dense_cost: of the dense layer, in the same unit.
    """

    folding: str
    num_slices: int
    rank: int
    relative_error: float
    cost: int
    dense_cost: int


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
        unit: of all costs, ``"parameters"``, ``"bytes"`` or ``"multiply_adds"``.
        error: name of the error measure.
        method: name and arguments of the method.
        gap: what the method's objective would be at its smallest is at least ``1 - gap`` times what it is here; 0 where
            it is exact, or the method has none.
        weights: layer name -> what its error was multiplied with among the others; empty: all count the same.
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
        written = asdict(self)
        written["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return {"version": VERSION, **written}

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
        """Return the table of all layers, the skipped ones by reason, and the totals, at most 80 characters wide."""
        header = ["layer", "shape", "kernel", "slices", "rank", "error", "kept"]
        rows = [self._row(name, layer) for name, layer in self.layers.items()]
        others = sum(2 + max(len(row[column]) for row in [header, *rows]) for column in range(1, len(header)))
        rows = [[shorten(row[0], max(12, WIDTH - others)), *row[1:]] for row in rows]
        table = align(header, rows, right=frozenset({3, 4, 5, 6}))
        return "\n".join([table, *map(wrap, self._skipped_lines()), wrap(self.summary())])

    def _row(self, name: str, layer: Factorization | None) -> list[str]:
        shape = "x".join(map(str, self.shapes[name]))
        if layer is None:
            return [readable(name), shape, "dense", "", "", "", "100.0%"]
        kept = f"{layer.cost / layer.dense_cost:.1%}"
        ranks = [str(layer.num_slices), str(layer.rank), f"{layer.relative_error:.3f}"]
        return [readable(name), shape, _KERNEL[layer.folding], *ranks, kept]

    def _skipped_lines(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(readable(name))
        return [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]

    def summary(self) -> str:
        """Return one line: the cost before and after, the budget, the worst error, and a gap if there is one."""
        unit = self.unit.replace("_", "-")
        gap = f", objective proven within {self.gap:.1e} of the smallest" if self.gap else ""
        return (
            f"{len(self.factorized)} of {len(self.layers)} layers factorized: "
            f"{self.dense_cost:,} -> {self.cost:,} {unit} "
            f"({self.cost / self.dense_cost:.1%} kept, {self.keep_ratio:.1%} asked), "
            f"worst {self.error} error {self.worst_error:.3f}{gap}"
        )


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
}
_LATER: dict[str, Any] = {"gap": 0.0, "weights": {}}
"""Fields that files of the same version may lack, and what they are then."""
_LAYER_FIELDS: dict[str, Kind] = {
    "folding": str,
    "num_slices": int,
    "rank": int,
    "relative_error": (int, float),
    "cost": int,
    "dense_cost": int,
}


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
    layers = {name: _read_layer(name, layer) for name, layer in parts["layers"].items()}
    shapes = {name: _read_shape(name, shape) for name, shape in parts["shapes"].items()}
    if set(shapes) != set(layers):
        raise ValueError(
            f"Allocation: `shapes` must name the same layers as `layers`, they differ in "
            f"{sorted(set(shapes) ^ set(layers))}; the file is damaged, write it again."
        )
    return Allocation(**{**parts, "layers": layers, "shapes": shapes})


def _check_ranges(parts: Mapping[str, Any]) -> None:
    """Refuse names, a unit, costs or a ratio that no allocation has."""
    if not all(
        isinstance(name, str) for field_ in ("layers", "skipped", "shapes", "weights") for name in parts[field_]
    ):
        raise ValueError("Allocation: the names of layers must be strings; the file is damaged or foreign.")
    if not all(isinstance(reason, str) for reason in parts["skipped"].values()):
        raise ValueError("Allocation: `skipped` must give each reason as a string; the file is damaged or foreign.")
    _check_method(parts["method"])
    if parts["unit"] not in COSTS:
        raise ValueError(f"Allocation: `unit` must be one of {list(COSTS)}, got {parts['unit']!r}.")
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
    if parts["budget"] < 0:
        raise ValueError(f"Allocation: `budget` must not be negative, got {parts['budget']}.")


def _check_method(method: Mapping[str, Any]) -> None:
    """Refuse what no method writes, and a number that factors are built with and that is out of range."""
    if not is_plain(method):
        raise ValueError(f"Allocation: `method` must hold names, numbers and lists, got {describe(method)}.")
    shrinkage = method.get("shrinkage", 0.0)
    if type(shrinkage) not in (int, float) or not 0 <= shrinkage <= 1:
        raise ValueError(f"Allocation: `shrinkage` of the method must be from 0 to 1, got {describe(shrinkage)}.")


def _read_layer(name: str, written: object) -> Factorization | None:
    if written is None:
        return None
    where = f"Allocation, layer {name!r}"
    if not isinstance(written, Mapping):
        raise ValueError(f"{where}: must be a dict or null, got {describe(written)}.")
    layer = Factorization(**check_fields(written, _LAYER_FIELDS, where))
    if layer.folding not in FOLDINGS:
        raise ValueError(f"{where}: `folding` must be one of {list(FOLDINGS)}, got {layer.folding!r}.")
    if layer.num_slices < 1 or layer.rank < 1:
        raise ValueError(f"{where}: `num_slices` and `rank` must be at least 1, got {layer.num_slices}, {layer.rank}.")
    if not 0 <= layer.relative_error <= _LARGEST_ERROR:
        raise ValueError(
            f"{where}: `relative_error` must be a finite number from 0, got {describe(layer.relative_error)}."
        )
    if not 0 < layer.cost <= layer.dense_cost:
        raise ValueError(
            f"{where}: `cost` must be above 0 and at most `dense_cost`, got {layer.cost} and {layer.dense_cost}."
        )
    return layer


def _read_shape(name: str, written: object) -> tuple[int, ...]:
    if isinstance(written, (list, tuple)) and len(written) >= 2 and all(map(_is_size, written)):
        return tuple(written)
    raise ValueError(
        f"Allocation, layer {name!r}: its shape must be a list of at least two whole numbers from 1, got "
        f"{describe(written)}."
    )


def _is_size(size: object) -> bool:
    return type(size) is int and 1 <= size < 2**63
