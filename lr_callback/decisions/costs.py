"""Costs: what a layer takes, dense and factorized, exactly, in whole units.

A factorized layer costs ``fixed + rank * per_rank``. Units: ``parameters`` (``sum(p.numel())`` of the module that is
built), ``bytes`` (of these parameters, each in its dtype) and ``multiply_adds`` (half of what torch's flop counter
counts for it; biases are not counted). Units that are no such line in the rank have a :class:`LayerCost` of their own:
``latency``, ``activation_memory``, and what a user's function says.

A weight is applied at positions, and which ones depends on the layer. A convolution works at the positions of its
output. A transposed one works at those of its input; where an encoder comes before, that is as large as the output
along the axes that the encoder has upsampled already. An embedding looks up: that multiplies nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lr_callback.mathematics.folding import FOLDINGS, Geometry, decoder_axes

COUNTED = ("parameters", "multiply_adds", "bytes")
"""Names of the units that are counted exactly."""

LATENCY = "latency"
"""Name of the unit that is measured: nanoseconds of one run, shown as microseconds."""

ACTIVATION_MEMORY = "activation_memory"
"""Name of the unit of what a run keeps for its backward pass: bytes. Factorized layers keep more, but for the
copies of weights that autocast makes."""

COSTS = (*COUNTED, LATENCY, ACTIVATION_MEMORY)
"""Names of the known units."""

OBSERVED = frozenset({"multiply_adds", LATENCY, ACTIVATION_MEMORY})
"""Units that depend on how the model is called."""

Unit: TypeAlias = str | Callable[[nn.Module], float]
"""What a user names as a cost: one of the known units, or a function of a module."""

_OWN = re.compile(r"[^\W\d]\w*(\.([^\W\d]\w*|<locals>|<lambda>))+")
"""The path of a function: names with dots between them, at least two."""

Works = Literal["at outputs", "at inputs", "by lookup"]
"""Where a layer's multiply-adds arise: at each position of its output, of its input, or nowhere."""


@dataclass(frozen=True)
class Call:
    """One observed call of a layer.

    Args:
        batch: number of samples; for a Linear layer the product of the leading dimensions.
        inputs: sizes of the input's spatial axes, as many as the kernel has axes.
        outputs: sizes of the output's spatial axes.
    """

    batch: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def positions(self, input_axes: tuple[int, ...] = ()) -> int:
        """Return the number of output positions, counted over the input along the named axes."""
        sizes = (self.inputs[axis] if axis in input_axes else size for axis, size in enumerate(self.outputs))
        return self.batch * prod(sizes)


class LayerCost(ABC):
    """Cost of one layer in one unit, dense and at every rank.

    Attributes:
        geometry: sizes of the weight.
        gates: whether a form that costs no less than the dense layer may not be chosen for the sake of another unit.
    """

    gates: ClassVar[bool] = False
    geometry: Geometry

    @property
    @abstractmethod
    def dense(self) -> int:
        """Cost of the dense layer."""

    @abstractmethod
    def at_ranks(self, folding: str, num_slices: int, last: int) -> Tensor:
        """Return the costs of the factorized layer at rank 0 to ``last``, int64."""

    @abstractmethod
    def last_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank, up to the full one, that costs less than the dense layer; 0 if none does."""

    @abstractmethod
    def distinct_foldings(self, foldings: Iterable[str]) -> tuple[str, ...]:
        """Drop foldings that give the same matrices as another, and repeated names; the cheapest of equals stays."""

    def slopes(self, folding: str, counts: Iterable[int]) -> dict[int, int] | None:
        """Return the cost of one rank for each number of slices, where all ranks cost the same; None if they do not."""
        return None


@dataclass(frozen=True)
class CountedCost(LayerCost):
    """Cost of one layer in a unit that is counted: ``fixed + rank * per_rank``.

    Args:
        geometry: sizes of the weight.
        bias: what the bias counts where it is held, 0 without one.
        calls: observed calls, for ``multiply_adds``; None for what the layer holds.
        works: where the dense layer's multiply-adds arise.
        entry: what one entry of the weight counts where it is held: 1 for ``parameters``, its size for ``bytes``.

    Example::

        >>> CountedCost(Geometry(64, 32, (3, 3)), bias=64).dense
        18496
        >>> CountedCost(Geometry(64, 32, (3, 3)), bias=64, calls=(Call(1, (8, 8), (4, 4)),)).dense
        294912
    """

    geometry: Geometry
    bias: int = 0
    calls: tuple[Call, ...] | None = None
    works: Works = "at outputs"
    entry: int = 1

    @property
    def fixed(self) -> int:
        """Cost that does not depend on the form of the layer: its bias, where it is held and not worked with."""
        return self.bias if self.calls is None else 0

    @property
    def dense(self) -> int:
        """Cost of the dense layer."""
        return self.fixed + prod(self.geometry.weight_shape) * self._first_positions(())

    def per_rank(self, folding: str, num_slices: int) -> int:
        """Return the cost of one rank in every slice of every group: one encoder row and one decoder column a slice."""
        encoder = self.geometry.in_channels * prod(self.geometry.encoder_kernel(folding))
        decoder = num_slices * self.geometry.out_channels * prod(self.geometry.decoder_kernel(folding))
        # Along the decoder's kernel axes the stride is still to come: there the encoder's output is as its input.
        own = decoder_axes(folding, len(self.geometry.kernel))
        second = self._positions(own if self.works == "at inputs" else ())
        return encoder * self._first_positions(own) + decoder * second

    def distinct_foldings(self, foldings: Iterable[str]) -> tuple[str, ...]:
        """Drop foldings that give the same matrices as another (1x1 kernels, Linear), and repeated names.

        Those that agree differ in where a kernel axis of size 1 is, and its stride with it: the cheapest stays. Of
        equals it is, for a convolution, the one with the fewest axes in the decoder, so that the encoder works at fewer
        positions; for a transposed one, whose stride makes more positions, the one with the most.

        Raises:
            ValueError: If a folding is unknown.

        Example::

            >>> CountedCost(Geometry(8, 8, (1, 1))).distinct_foldings(["kernel_in_decoder", "kernel_in_encoder"])
            ('kernel_in_encoder',)
        """

        def price(folding: str) -> tuple[int, int, int]:
            axes = len(decoder_axes(folding, len(self.geometry.kernel)))
            return self.per_rank(folding, 1), -axes if self.works == "at inputs" else axes, len(FOLDINGS[folding])

        kept: dict[tuple[int, ...], str] = {}
        for name in foldings:
            kernel = self.geometry.decoder_kernel(name)
            kept[kernel] = min(kept.get(kernel, name), name, key=price)
        return tuple(kept.values())

    def _first_positions(self, pointwise: tuple[int, ...]) -> int:
        """Return the positions at which a weight is applied to the layer's input, with no stride along some axes."""
        if self.calls is not None and self.works == "by lookup":
            return 0
        return self._positions(tuple(range(len(self.geometry.kernel))) if self.works == "at inputs" else pointwise)

    def _positions(self, input_axes: tuple[int, ...]) -> int:
        """Sum the positions of all calls; what is held counts once, wherever it is applied."""
        return self.entry if self.calls is None else sum(call.positions(input_axes) for call in self.calls)

    def slopes(self, folding: str, counts: Iterable[int]) -> dict[int, int] | None:
        """Return the cost of one rank for each number of slices."""
        return {count: self.per_rank(folding, count) for count in counts}

    def last_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank, up to the full one, that costs less than the dense layer; 0 if none does."""
        per_rank = self.per_rank(folding, num_slices)
        fits = (self.dense - self.fixed - 1) // per_rank if per_rank > 0 else 0
        return max(0, min(fits, self.geometry.full_rank(folding, num_slices)))

    def at_ranks(self, folding: str, num_slices: int, last: int) -> Tensor:
        """Return the costs of the factorized layer at rank 0 to ``last``, int64."""
        return self.fixed + torch.arange(last + 1) * self.per_rank(folding, num_slices)

    def factorized(self, folding: str, num_slices: int, rank: int) -> int:
        """Return the cost of the factorized layer."""
        return self.fixed + rank * self.per_rank(folding, num_slices)


def check_cost(cost: object) -> None:
    """Refuse an unknown unit.

    Raises:
        ValueError: If ``cost`` is not in :data:`COSTS`.
    """
    if cost not in COSTS:
        raise ValueError(f"`cost` must be one of {list(COSTS)}, or a function of a module, got {cost!r}.")


def is_unit(unit: object) -> bool:
    """Return whether costs can be in a unit: a known one, or a function, by the path that it is imported by.

    Example::

        >>> is_unit("bytes"), is_unit("my_module.energy"), is_unit("byte")
        (True, True, False)
    """
    return unit in COSTS or (isinstance(unit, str) and _OWN.fullmatch(unit) is not None)


def most_of(unit: str) -> float:
    """Return the largest fraction that can be asked for in a unit: 1, or more where factorized layers take more.

    Example::

        >>> most_of("bytes"), most_of("activation_memory")
        (1.0, 10.0)
    """
    return 10.0 if unit == ACTIVATION_MEMORY else 1.0


def amount(unit: str, cost: int) -> str:
    """Return a cost as text.

    Example::

        >>> amount("multiply_adds", 12_000), amount("latency", 12_000), amount("my_module.energy", 12_000)
        ('12,000 multiply-adds', '12 microseconds', '12,000 energy')
    """
    if unit == LATENCY:
        return f"{cost / 1000:,.0f} microseconds"
    return f"{cost:,} {'bytes of ' if unit == ACTIVATION_MEMORY else ''}{spoken(unit)}"


def spoken(unit: str) -> str:
    """Return the name of a unit as text.

    Example::

        >>> spoken("multiply_adds"), spoken("activation_memory")
        ('multiply-adds', 'activation memory')
    """
    if unit == ACTIVATION_MEMORY:
        return "activation memory"
    return unit.replace("_", "-") if unit in COSTS else unit.rpartition(".")[2]
