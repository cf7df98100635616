"""Alternate: both factors of a layer, slice after slice, closest to wanted outputs, from moments alone.

What the outputs should be is ``M x``, ``M`` the unsliced linear map that comes closest to them. One slice at a time
gets the best factors for what the others leave of ``M x``: principal components of that, seen through the slice's own
inputs. Last, all slices' decoders are solved for at once.

With inputs of a network that was cut before this layer, ``M`` differs from the layer's dense weight: it mends, as far
as a linear map can, what the layers before have changed (Zhang et al., arXiv 1505.06798, section 3.3, for one slice).
Of few images all of this learns the images: where that is asked for, what was found on one half of them must serve on
the other; else the factors stay, and only the mean of the outputs is made up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lr_callback.mathematics.regression import ridge_solve
from lr_callback.mathematics.weighting import project


@dataclass(frozen=True)
class Seen:
    """Moments of one group of a layer, of rows ``[x, e, 1]``: its inputs, and what the dense map of them lacks.

    Args:
        both: ``(c + f + 1, c + f + 1)`` float64.
        weight: ``(f, c)`` float64, the dense map.
        intercept: whether the layer has a bias, which may change.
        halves: the same moments of two halves of the rows, which share no image; none: the halves are not known.
    """

    both: Tensor
    weight: Tensor
    intercept: bool
    halves: tuple[Tensor, ...] = ()

    @property
    def means(self) -> Tensor:
        """Means ``(c + f,)`` where the bias takes them up, else zero: nothing is centered then."""
        means = self.both[-1, :-1]
        return means if self.intercept else torch.zeros_like(means)

    @property
    def centered(self) -> Tensor:
        """Second moments about the means."""
        return self.both[:-1, :-1] - torch.outer(self.means, self.means)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Moments ``(c, c)`` of the inputs, and their products ``(f, c)`` with what is missing, about the means."""
        size, centered = self.weight.shape[1], self.centered
        return centered[:size, :size], centered[size:, :size]

    @property
    def parts(self) -> list[Seen]:
        """The two halves, each by itself; nothing, if they are not known."""
        return [replace(self, both=half, halves=()) for half in self.halves] if len(self.halves) == 2 else []

    def learned(self) -> list[Tensor]:
        """Return what is added to the dense map, as found on each half; nothing without halves.

        It is found by regression on all inputs, which learns the rows, too, and the positions of one image are no
        independent rows. So it is multiplied by what serves best, from 0 to 1, on the half that it was not found on.
        """
        moments = [part.moments for part in self.parts]
        changes = [ridge_solve(*half) for half in moments]
        gained = energy = 0.0
        for change, (squares, products) in zip(changes, reversed(moments), strict=True):
            gained += float((change * products).sum())
            energy += float(((change @ squares) * change).sum())
        kept = min(1.0, max(0.0, gained / energy)) if energy > 0 else 0.0
        return [kept * change for change in changes]

    def shift(self, built: Tensor) -> Tensor:
        """Return the change of the bias ``(f,)`` that goes with a map that was built."""
        size = self.weight.shape[1]
        return self.means[size:] + (self.weight - built) @ self.means[:size]

    def squared(self, built: Tensor, shift: Tensor) -> float:
        """Return the mean squared error of a map that was built, with a change of the bias."""
        off = torch.cat([self.weight - built, torch.eye(len(self.weight), dtype=built.dtype, device=built.device)], 1)
        mean = off @ self.both[-1, :-1]
        return float(((off @ self.both[:-1, :-1]) * off).sum() - 2 * (shift * mean).sum() + shift.square().sum())


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


def alternate(seen: Seen, left: Tensor, right: Tensor, check: bool = False) -> Alternated:
    """Return better factors of one group of a layer than the ones given.

    Args:
        seen: what came in, and what came out.
        left: ``(k, f, j)``, the decoder of each slice, float64.
        right: ``(k, j, c / k)``, the encoder of each slice, float64.
        check: keep the ones given where those of one half of the images do not serve the other.
    """
    changes, former = seen.learned(), _composed(left, right)
    before = seen.squared(former, torch.zeros_like(former[:, 0]))
    if not check or _serves(seen, changes, left, right):
        left, right = _fitted(seen, _mean(changes, seen.weight), left, right)
    built = _composed(left, right)
    shift = seen.shift(built)
    return Alternated(left, right, shift, before, seen.squared(built, shift))


def _mean(changes: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return the map that the outputs should come from."""
    return weight + sum(changes, torch.zeros_like(weight)) / max(1, len(changes))


def _serves(seen: Seen, changes: Sequence[Tensor], left: Tensor, right: Tensor) -> bool:
    """Return whether factors found on one half of the images err less on the other than those that there are."""
    new = old = 0.0
    parts, former = seen.parts, _composed(left, right)
    for own, other, change in zip(parts, reversed(parts), changes, strict=True):
        built = _composed(*_fitted(own, own.weight + change, left, right))
        new += other.squared(built, own.shift(built))
        old += other.squared(former, own.shift(former))
    return not parts or new < old


def _fitted(seen: Seen, wanted: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of all slices that come closest to a map of what was seen."""
    squares, _ = seen.moments
    if len(right) == 1:
        left, right = (one.unsqueeze(0) for one in project(wanted, right.shape[1], squares))
    else:
        left, right = _sweep(squares, wanted, _decoders(squares, wanted, left, right), right)
    return _even(_decoders(squares, wanted, left, right), right)


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
