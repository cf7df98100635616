"""Outputs: the floating tensors that a model gives for batches, how far they vary, and how far apart two are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite

from torch import Tensor
from torch.utils._pytree import tree_leaves

_ROUNDING = 1e-12
"""Of a mean square: a variance below it cannot be told from none."""


@dataclass
class Sums:
    """Sums over all entries of one output, on all batches."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, parts: Sequence[Sums]) -> Sums:
        """Add up sums."""
        return cls(*(fsum(getattr(one, part) for one in parts) for part in ("count", "total", "squares")))

    def add(self, values: Tensor, when: str = "") -> None:
        """Add entries.

        Raises:
            ValueError: If one is not finite.
        """
        double = values.detach().double()
        total, squares = float(double.sum()), float(double.square().sum())
        if not isfinite(squares):
            raise ValueError(
                f"The outputs of the model on the calibration batches{when} must be finite, found NaN or infinity."
            )
        self.count, self.total, self.squares = self.count + values.numel(), self.total + total, self.squares + squares

    def variance(self, count: float) -> float:
        """Return the variance of so many entries, those that were not added being zero; 0 where it is rounding."""
        mean_square = self.squares / count
        found = mean_square - (self.total / count) ** 2
        return found if found > _ROUNDING * mean_square else 0.0


Outputs = dict[int, Sums]
"""Place of an output among all -> its sums."""


def outputs_of(result: object) -> list[Tensor]:
    """Return the floating tensors in what a run of a model returned, in any nesting; not scalars, as a loss is one.

    Raises:
        ValueError: If there are none.

    Example::

        >>> import torch
        >>> [tuple(one.shape) for one in outputs_of({"scores": torch.zeros(2, 3), "best": [torch.tensor([1, 0])]})]
        [(2, 3)]
    """
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    floating = [leaf.detach() for leaf in leaves if leaf.is_floating_point() and leaf.dim() and leaf.numel()]
    if not floating:
        raise ValueError(
            f"Effects are those on the outputs of the model: the run of a batch must return them, got {len(leaves)} "
            "tensor(s), none of floating numbers with an axis. Give a `forward` that returns what counts."
        )
    return floating


def changes(name: str, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    """Return what outputs change by, once a layer is cut.

    Raises:
        ValueError: If they are of other shapes then; the layer is named.
    """
    shapes = [[tuple(one.shape) for one in outputs] for outputs in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: the outputs of the model must be of the same shapes whether it is cut or not, got {shapes[1]} "
            f"in place of {shapes[0]}. Give a `forward` that returns what can be compared: scores, before a selection."
        )
    return [other.double() - one.double() for one, other in zip(wanted, found, strict=True)]


def add(sums: Outputs, values: Sequence[Tensor], when: str = "") -> None:
    """Add one batch's outputs to the sums of each.

    Raises:
        ValueError: If one is not finite; the text says when that is.
    """
    for place, one in enumerate(values):
        sums.setdefault(place, Sums()).add(one, when)


def summed(parts: Sequence[Outputs]) -> Outputs:
    """Add up what several processes have summed."""
    places = {place: None for part in parts for place in part}
    return {place: Sums.of([part[place] for part in parts if place in part]) for place in places}
