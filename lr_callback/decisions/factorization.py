"""Factorization: what one layer becomes, and what a model costs in a unit, as plain data that is checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lr_callback.common.written import Kind, check_fields, describe
from lr_callback.decisions.costs import COSTS, most_of
from lr_callback.mathematics.folding import FOLDINGS

_LARGEST_ERROR = 1e6
"""Beyond any error of a layer, which is at most the root of its slices."""

_LAYER_FIELDS: dict[str, Kind] = {
    "folding": str,
    "num_slices": int,
    "rank": int,
    "relative_error": (int, float),
    "cost": int,
    "dense_cost": int,
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

    @property
    def kept(self) -> float | None:
        """Fraction of the dense layer's cost that is kept; None where that is nothing, in units of a run without it."""
        return self.cost / self.dense_cost if self.dense_cost else None


@dataclass(frozen=True)
class Spending:
    """What a model costs in another unit than that of its allocation.

    Args:
        cost: of the whole model as allocated.
        dense_cost: of the whole model, all layers dense.
        budget: what ``cost`` had to stay within.
    """

    cost: int
    dense_cost: int
    budget: int


def read_spending(unit: object, written: object) -> Spending:
    """Check what was written of a unit, and build it.

    Raises:
        ValueError: If it is damaged.
    """
    where = f"Allocation, `others`, {unit!r}"
    if not isinstance(unit, str) or unit not in COSTS or not isinstance(written, Mapping):
        raise ValueError(f"{where}: must be one of {list(COSTS)} with a dict, got {describe(written)}.")
    one = Spending(**check_fields(written, {"cost": int, "dense_cost": int, "budget": int}, where))
    most = most_of(unit)
    if not 0 <= one.cost <= most * one.dense_cost or not one.dense_cost or one.budget < 0:
        limit = "`dense_cost`" if most == 1 else f"{most:g} times `dense_cost`"
        raise ValueError(f"{where}: `cost` must be from 0 to {limit}, and `budget` not negative, got {one}.")
    return one


def read_layer(name: str, written: object) -> Factorization | None:
    """Check what was written of a layer, and build it.

    Raises:
        ValueError: If it is damaged.
    """
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
    if min(layer.cost, layer.dense_cost) < 0:  # for the sake of another unit a form may cost more than the dense layer
        found = f"{layer.cost} and {layer.dense_cost}"
        raise ValueError(f"{where}: `cost` and `dense_cost` must be at least 0, got {found}.")
    return layer


def read_shape(name: str, written: object) -> tuple[int, ...]:
    """Check a written shape.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(written, (list, tuple)) and len(written) >= 2 and all(map(_is_size, written)):
        return tuple(written)
    raise ValueError(
        f"Allocation, layer {name!r}: its shape must be a list of at least two whole numbers from 1, got "
        f"{describe(written)}."
    )


def _is_size(size: object) -> bool:
    return type(size) is int and 1 <= size < 2**63
