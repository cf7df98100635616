"""Alternate: both factors of a layer, slice after slice, closest to wanted outputs, from moments alone.

What the outputs should be is ``M x``, ``M`` the unsliced linear map that comes closest to them. One slice at a time
gets the best factors for what the others leave of ``M x``: principal components of that, seen through the slice's own
inputs. Last, all slices' decoders are solved for at once.

With inputs of a network that was cut before this layer, ``M`` differs from the layer's dense weight: it mends, as far
as a linear map can, what the layers before have changed (Zhang et al., arXiv 1505.06798, section 3.3, for one slice).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lr_callback.regression import ridge_solve
from lr_callback.weighting import project


@dataclass(frozen=True)
class Seen:
    """Moments of one group of a layer, of rows ``[x, e, 1]``: its inputs, and what the dense map of them lacks.

    Args:
        both: ``(c + f + 1, c + f + 1)`` float64.
        weight: ``(f, c)`` float64, the dense map.
        intercept: whether the layer has a bias, which may change.
        count: number of rows.
    """

    both: Tensor
    weight: Tensor
    intercept: bool
    count: int

    @property
    def means(self) -> Tensor:
        """Means ``(c + f,)`` where the bias takes them up, else zero: nothing is centered then."""
        means = self.both[-1, :-1]
        return means if self.intercept else torch.zeros_like(means)

    @property
    def centered(self) -> Tensor:
        """Second moments about the means."""
        return self.both[:-1, :-1] - torch.outer(self.means, self.means)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the moments ``(c, c)`` of the inputs, and the map ``M``.

        What is added to the dense map is found by regression on all inputs, which learns the rows, too, where they are
        few. So it counts only by that part of its ``R^2`` that is left when that is adjusted for the number of inputs,
        ``1 - (1 - R^2) (n - 1) / (n - c - 1)``; nothing, of less than two rows for each input.

        Source: the adjusted coefficient of determination, Ezekiel, "Methods of Correlation Analysis" (1930).
        """
        size, centered = self.weight.shape[1], self.centered
        squares, products = centered[:size, :size], centered[size:, :size]
        if self.count < 2 * size:
            return squares, self.weight
        change = ridge_solve(squares, products)
        explained, total = float((change * products).sum()), float(centered[size:, size:].trace())
        if explained <= 0:
            return squares, self.weight
        left = 1 - (1 - explained / total) * (self.count - 1) / max(1, self.count - size - 1)
        return squares, self.weight + max(0.0, left * total / explained) * change

    def shift(self, built: Tensor) -> Tensor:
        """Return the change of the bias ``(f,)`` that goes with a map that was built."""
        size = self.weight.shape[1]
        return self.means[size:] + (self.weight - built) @ self.means[:size]

    def squared(self, built: Tensor) -> float:
        """Return the mean squared error of a map that was built, with the bias as it is."""
        off = torch.cat([self.weight - built, torch.eye(len(self.weight), dtype=built.dtype, device=built.device)], 1)
        return float(((off @ self.both[:-1, :-1]) * off).sum())


@dataclass(frozen=True)
class Alternated:
    """Better factors of one group of a layer.

    Args:
        left: ``(k, f, j)``, the decoder of each slice.
        right: ``(k, j, c / k)``, the encoder of each slice.
        shift: change of the bias ``(f,)``.
        before: mean squared error of the outputs with the factors before.
        after: with these, and the bias changed.
    """

    left: Tensor
    right: Tensor
    shift: Tensor
    before: float
    after: float


def alternate(seen: Seen, left: Tensor, right: Tensor) -> Alternated:
    """Return better factors of one group of a layer than the ones given.

    Args:
        seen: what came in, and what came out.
        left: ``(k, f, j)``, the decoder of each slice, float64.
        right: ``(k, j, c / k)``, the encoder of each slice, float64.
    """
    squares, wanted = seen.solve()
    before = seen.squared(_composed(left, right))
    if len(right) == 1:
        left, right = (one.unsqueeze(0) for one in project(wanted, right.shape[1], squares))
    else:
        left, right = _sweep(squares, wanted, _decoders(squares, wanted, left, right), right)
    left, right = _even(_decoders(squares, wanted, left, right), right)
    built = _composed(left, right)
    shift = seen.shift(built)
    # The bias takes up the means of what is missing: their square is what it gains.
    return Alternated(left, right, shift, before, seen.squared(built) - float(shift.square().sum()))


def _composed(left: Tensor, right: Tensor) -> Tensor:
    """Return the map ``(f, c)`` of the factors of all slices, side by side."""
    return torch.cat(list(left @ right), dim=1)


def _even(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give each column of a decoder and its row of the encoder the same length: they train at the same pace then."""
    lengths = left.norm(dim=1), right.norm(dim=2)
    empty = (lengths[0] == 0) | (lengths[1] == 0)
    root = torch.where(empty, 1.0, lengths[1] / lengths[0].where(~empty, 1.0)).sqrt()
    return left * root.unsqueeze(1), right / root.unsqueeze(2)


def _sweep(squares: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give each slice, one after the other, the best factors for what the others leave."""
    left, right = left.clone(), right.clone()
    rest, width = wanted - _composed(left, right), right.shape[2]
    for index in range(len(left)):
        own = slice(index * width, (index + 1) * width)
        rest[:, own] += left[index] @ right[index]
        block = squares[own, own]
        target = rest[:, own] + ridge_solve(block, rest @ squares[:, own] - rest[:, own] @ block)
        left[index], right[index] = project(target, right.shape[1], block)
        rest[:, own] -= left[index] @ right[index]
    return left, right


def _decoders(squares: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the best decoders ``(k, f, j)`` of all slices at once, their encoders fixed."""
    slices, rank, width = right.shape
    encoder = right.new_zeros(slices, rank, slices, width)
    encoder.diagonal(dim1=0, dim2=2).copy_(right.permute(1, 2, 0))
    encoder = encoder.reshape(slices * rank, slices * width)
    seen = encoder @ squares
    decoder = torch.cat(list(left), dim=1)
    change = ridge_solve(seen @ encoder.T, (wanted - decoder @ encoder) @ seen.T)
    return torch.stack((decoder + change).chunk(len(left), dim=1))
