"""Curves: what figures draw of a compression, spectra of layers and error against size: plain data, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lr_callback.common.written import Kind, check_fields, describe, is_number
from lr_callback.decisions.costs import COSTS, is_unit
from lr_callback.mathematics.folding import FOLDINGS

VERSION = 1
"""Version of the written form; a newer one is refused."""

_LARGEST_ERROR = 1e6
_SPECTRA = {
    "slice": "largest singular value of a slice",
    "bound": "largest singular value of a slice",
    "operator": "largest singular value",
    "frobenius": "singular values of all slices, root of the sum of squares",
}


@dataclass(frozen=True)
class LayerCurve:
    """The spectrum of a layer and its error, at some ranks, of the folding and the slices that were chosen.

    Args:
        folding: which kernel axes go to the decoder.
        num_slices: ``k``.
        rank: that is kept; None: the layer stays dense, and the curve is that of its first candidate.
        full_rank: the smaller side of a slice.
        dense_cost: of the layer, in the unit of the curves.
        ranks: ascending, from 1, up to the last that costs less than the dense layer; ``rank`` is one of them.
        errors: relative error of the layer when cut off at each of the ranks.
        values: singular value at each of the ranks, relative to the largest, in [0, 1], see :attr:`Curves.spectrum`;
            None where the analysis does not tell it.
    """

    folding: str
    num_slices: int
    rank: int | None
    full_rank: int
    dense_cost: int
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Point:
    """The whole model at one size.

    Args:
        cost: of it.
        worst_error: largest relative error of a layer.
        mean_error: over all layers, those that stay dense with 0.
    """

    cost: int
    worst_error: float
    mean_error: float


@dataclass(frozen=True)
class Curves:
    """What is drawn of an analysis and an allocation made of it: :meth:`lr_callback.Analysis.curves` makes it.

    Args:
        layers: layer name -> its curve, of those that can be factorized, in the model's order.
        tradeoff: what the method makes of other budgets, ascending in cost; empty where it cannot tell that quickly.
            With budgets in several units, of the first one alone. Close to the best at each budget, not always it.
        chosen: the allocation.
        dense_cost: of the whole model.
        unit: of all costs.
        error: name of the error measure.
        left_out: number of other layers that can be factorized, all smaller than those in ``layers``.

    Example::

        >>> import lr_callback
        >>> from torch import nn
        >>> analysis = lr_callback.analyze(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)))
        >>> curves = analysis.curves(analysis.allocate(0.5))
        >>> list(curves.layers), curves.chosen.cost <= 0.5 * curves.dense_cost
        (['0', '1'], True)
        >>> Curves.from_dict(curves.to_dict()) == curves
        True
    """

    layers: Mapping[str, LayerCurve]
    tradeoff: tuple[Point, ...]
    chosen: Point
    dense_cost: int
    unit: str
    error: str
    left_out: int = 0

    @property
    def spectrum(self) -> str:
        """Say what the singular values are of: the largest of the slices' or all together, weighted as the error is."""
        return _SPECTRA.get(self.error, f"{_SPECTRA['frobenius']}, weighted as in {self.error}")

    def to_dict(self) -> dict[str, Any]:
        """Return the curves as dicts, lists, strings and numbers (``torch.load(weights_only=True)`` takes it)."""
        written = asdict(self)
        for layer in written["layers"].values():
            layer.update({name: list(layer[name]) for name in ("ranks", "errors", "values")})
        return {"version": VERSION, **written, "tradeoff": list(written["tradeoff"])}

    @classmethod
    def from_dict(cls, written: object) -> Curves:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If it is damaged or foreign, or was written by a newer version.
        """
        if not isinstance(written, Mapping) or type(written.get("version")) is not int or written["version"] < 1:
            raise ValueError(f"Curves: must be a dict that `Curves.to_dict()` wrote, got {describe(written)}.")
        if written["version"] > VERSION:
            raise ValueError(
                f"Curves: version {written['version']} is newer than {VERSION}, the newest that this lr_callback "
                "reads; update lr_callback."
            )
        parts = check_fields(written, _FIELDS, "Curves")
        _check(is_unit(parts["unit"]), f"`unit` must be one of {list(COSTS)}, or the path of a function", parts["unit"])
        _check(parts["dense_cost"] > 0, "`dense_cost` must be above 0", parts["dense_cost"])
        _check(parts["left_out"] >= 0, "`left_out` must be at least 0", parts["left_out"])
        layers = {name: _layer(name, layer) for name, layer in parts["layers"].items()}
        tradeoff, chosen = tuple(map(_point, parts["tradeoff"])), _point(parts["chosen"])
        return cls(**{**parts, "layers": layers, "tradeoff": tradeoff, "chosen": chosen})


_FIELDS: Mapping[str, Kind] = {
    "layers": dict,
    "tradeoff": (list, tuple),
    "chosen": dict,
    "dense_cost": int,
    "unit": str,
    "error": str,
    "left_out": int,
}
_LAYER_FIELDS: Mapping[str, Kind] = {
    "folding": str,
    "num_slices": int,
    "rank": (int, type(None)),
    "full_rank": int,
    "dense_cost": int,
    "ranks": (list, tuple),
    "errors": (list, tuple),
    "values": (list, tuple),
}
_POINT_FIELDS: Mapping[str, Kind] = {"cost": int, "worst_error": (int, float), "mean_error": (int, float)}


def _layer(name: object, written: object) -> LayerCurve:
    where = f"layer {describe(name)}"
    _check(isinstance(name, str) and isinstance(written, dict), f"{where}: must be a name with a dict", written)
    assert isinstance(written, dict)
    parts = check_fields(written, _LAYER_FIELDS, f"Curves, {where}")
    ranks, rank = parts["ranks"], parts["rank"]
    _check(parts["folding"] in FOLDINGS, f"{where}: `folding` must be one of {list(FOLDINGS)}", parts["folding"])
    counts = (parts["num_slices"], parts["full_rank"], *ranks)
    _check(all(type(one) is int and 1 <= one < 2**63 for one in counts), f"{where}: counts must be from 1", counts)
    _check(all(one < other for one, other in pairwise(ranks)), f"{where}: `ranks` must ascend", ranks)
    _check(rank is None or rank in ranks, f"{where}: `rank` must be None or one of `ranks`", rank)
    _check(parts["dense_cost"] >= 0, f"{where}: `dense_cost` must be at least 0", parts["dense_cost"])
    _check(_are_errors(parts["errors"]), f"{where}: `errors` must be finite numbers from 0", parts["errors"])
    known = [one for one in parts["values"] if one is not None]
    _check(_are_errors(known) and max(known, default=0) <= 1, f"{where}: `values` must be from 0 to 1", parts["values"])
    sizes = {len(parts[field]) for field in ("ranks", "errors", "values")}
    _check(len(sizes) == 1, f"{where}: `ranks`, `errors` and `values` must be of one length", sorted(sizes))
    return LayerCurve(**{**parts, **{field: tuple(parts[field]) for field in ("ranks", "errors", "values")}})


def _point(written: object) -> Point:
    _check(isinstance(written, dict), "a point must be a dict", written)
    assert isinstance(written, dict)
    point = Point(**check_fields(written, _POINT_FIELDS, "Curves, a point"))
    _check(point.cost >= 0, "the cost of a point must be at least 0", point.cost)
    _check(_are_errors((point.worst_error, point.mean_error)), "errors of a point must be finite, from 0", point)
    return point


def _are_errors(values: Sequence[object]) -> bool:
    return all(is_number(one) and 0 <= one <= _LARGEST_ERROR for one in values)


def _check(holds: bool, must: str, found: object) -> None:
    if not holds:
        raise ValueError(f"Curves: {must}, got {describe(found)}; the file is damaged or foreign.")
