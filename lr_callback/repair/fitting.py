"""Fitting: what is measured of one layer at a cut, and the factors that follow from it.

A fit says what rows a call of the layer gives, and what to do with their moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.calibration.collect import LARGEST, spread
from lr_callback.layers import FactorizedLayer, dense_bias
from lr_callback.layers.layer_types import dense_weight, layer_type
from lr_callback.mathematics.alternate import Seen, alternate
from lr_callback.mathematics.folding import decoder_matrices, unfold_decoder, unfold_encoder
from lr_callback.mathematics.moments import SecondMoments, summed
from lr_callback.mathematics.regression import regress
from lr_callback.model.running import watching


class Fit(ABC):
    """A fit of one factorized layer to the layer that it stands for.

    Args:
        student: the factorized layer.
        teacher: the layer before the cut.
        biases: whether the mean of the outputs may change.

    Attributes:
        norm: the BatchNorm layer that takes the outputs of a layer without a bias, and those of no other: it subtracts
            a mean, and so can take up a change of theirs; None: there is none.
        shift: what the mean of the outputs is to change by besides, ``(F,)``.
    """

    def __init__(self, student: FactorizedLayer, teacher: nn.Module, biases: bool = True) -> None:
        self.student, self.teacher, self.biases = student, teacher, biases
        self.norm: _BatchNorm | None = None
        self.shift = student.factors[0].new_zeros(student.geometry(student).out_channels)

    @property
    def intercept(self) -> bool:
        """Whether the mean of the outputs can be changed, and may be."""
        return self.biases and (self.student.bias is not None or self.norm is not None)

    @property
    @abstractmethod
    def width(self) -> int:
        """How many inputs are fitted to, of a group."""

    @abstractmethod
    def rows(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        """Return rows ``(g, n, s)``, float64, of one call.

        Args:
            inputs: of the layer.
            wanted: outputs of the teacher in the same call of the model before the cut.
        """

    def halves(self, inputs: Tensor, wanted: Tensor, split: bool) -> list[Tensor]:
        """Return the rows of one call, or those of its first images and of its last ones.

        Args:
            inputs: see :meth:`rows`.
            wanted: likewise.
            split: whether to split; a call without an axis of images, or of one image, is not split.
        """
        images = len(inputs) if inputs.dim() >= len(self.student.geometry(self.student).kernel) + 2 else 1
        if not split or images < 2 or len(wanted) != images:
            return [self.rows(inputs, wanted)]
        middle = images // 2
        return [self.rows(inputs[:middle], wanted[:middle]), self.rows(inputs[middle:], wanted[middle:])]

    @abstractmethod
    def solve(self, parts: Sequence[SecondMoments], check: bool = False) -> float:
        """Set the student's factors; return the fraction of the squared error of its outputs that is left.

        Args:
            parts: moments of all rows, or of two halves of them that share no image.
            check: keep the factors where those of one half do not serve the other, if that can be told.
        """

    @abstractmethod
    def missing(self, moments: SecondMoments) -> Tensor:
        """Return the mean of what the student's outputs lack, ``(F,)``."""

    def level(self, moments: SecondMoments) -> None:
        """Make up for what the outputs are off on average, and leave the factors as they are."""
        if self.intercept:
            self.shift_mean(self.missing(moments.to(self.shift.device)))

    def shift_mean(self, shift: Tensor) -> None:
        """Change the bias, or what :meth:`settle` is to do instead."""
        if self.student.bias is not None:
            self.student.bias.add_(shift.reshape(-1))
        elif self.norm is not None:
            self.shift += shift.reshape(-1)

    def settle(self) -> None:
        """Let the BatchNorm layer take up the shift: what it subtracts is less by that."""
        if self.norm is not None and self.norm.running_mean is not None:
            self.norm.running_mean -= self.shift.to(self.norm.running_mean)


def fit_of(student: FactorizedLayer, teacher: nn.Module, decoder_only: bool, biases: bool = True) -> Fit:
    """Return a fit of both factors where that can be done, else of the decoder."""
    kind, sizes = type(student), student.geometry(student)
    pointwise = prod(sizes.decoder_kernel(student.folding)) == 1
    inputs = sizes.in_channels // sizes.groups * prod(sizes.kernel)
    if decoder_only or not pointwise or not kind.has_patches or inputs > LARGEST:
        return DecoderFit(student, teacher, biases)
    return BothFit(student, teacher, biases)


class DecoderFit(Fit):
    """Least squares for the decoder: rows of what comes to it, of what its outputs lack, and of one."""

    @property
    def width(self) -> int:
        """Inputs of a group of the decoder, kernel positions included."""
        return self.student.ordered_factors[1][0].numel()

    def rows(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        """Return what comes to the decoder, what its outputs lack, and one, which gives the means."""
        decoder = self.student.decoder
        kind = layer_type(decoder)
        assert kind is not None
        seen: list[tuple[Tensor, Tensor]] = []
        sized = [list(wanted.shape)] if getattr(self.student, "transposed", False) else []
        with watching([decoder], lambda _, through, given: seen.append((through, given))):
            self.student.forward(
                inputs.to(self.student.factors[0].dtype) if inputs.is_floating_point() else inputs, *sized
            )
        [(through, given)] = seen
        missing, chosen = _results(kind, decoder, wanted.to(given.dtype) - given)
        patches = kind.patches(decoder, through, given, chosen)
        assert patches is not None
        return _stacked(patches.double(), missing.double())

    def missing(self, moments: SecondMoments) -> Tensor:
        """Return the means of the rows' middle part."""
        return moments.means[:, self.width : -1].flatten()

    def solve(self, parts: Sequence[SecondMoments], check: bool = False) -> float:
        """Change the decoder."""
        encoder, decoder = self.student.ordered_factors
        change, shift, left = regress(summed(parts), self.width, self.intercept)
        self.student.set_factors(encoder, decoder.double() + change.reshape(decoder.shape))
        self.shift_mean(shift)
        return left


class BothFit(Fit):
    """Encoder and decoder in turn: rows of inputs, of what the dense map of them lacks, and of one."""

    @property
    def width(self) -> int:
        """Inputs of a group at one position."""
        return self._weight.shape[2]

    @property
    def _weight(self) -> Tensor:
        """The map before the cut, ``(g, F / g, C / g * prod(kernel))``, float64."""
        weight = dense_weight(self.teacher).double()
        return weight.reshape(self.student.geometry(self.student).groups, -1, weight[0].numel())

    def rows(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        """Return the inputs, what the dense map of them lacks of the wanted outputs, and one."""
        kind = type(self.student)
        results, chosen = _results(kind, self.student, wanted)
        patches = kind.patches(self.student, inputs, wanted, chosen)
        assert patches is not None
        patches, results = patches.double(), results.double()
        bias = dense_bias(self.teacher)
        if bias is not None:
            results = results - bias.double().reshape(len(results), 1, -1)
        return _stacked(patches, results - patches @ self._weight.mT)

    def missing(self, moments: SecondMoments) -> Tensor:
        """Return what the dense map lacks on average, and what the factors lack of it."""
        means, off = moments.means, self._weight - dense_weight(self.student).double().reshape(self._weight.shape)
        return (means[:, self.width : -1] + (off @ means[:, : self.width, None]).squeeze(2)).flatten()

    def solve(self, parts: Sequence[SecondMoments], check: bool = False) -> float:
        """Change both factors."""
        student, sizes = self.student, self.student.geometry(self.student)
        encoder, decoder = (factor.double() for factor in student.ordered_factors)
        slices, groups = student.num_slices, sizes.groups
        whole, halves = summed(parts).products, [one.products for one in parts]
        left = decoder_matrices(decoder, slices, groups).reshape(groups, slices, -1, student.rank)
        right = encoder.reshape(groups, slices, student.rank, -1)
        found = [
            alternate(Seen(both, weight, self.intercept, own), one, other, check)
            for both, own, weight, one, other in zip(
                whole, zip(*halves, strict=True), self._weight, left, right, strict=True
            )
        ]
        encoders, decoders = torch.cat([one.right for one in found]), torch.cat([one.left for one in found])
        folding = student.folding
        student.set_factors(unfold_encoder(encoders, sizes, folding), unfold_decoder(decoders, sizes, folding))
        self.shift_mean(torch.cat([one.shift for one in found]))
        before, after = sum(one.before for one in found), sum(one.after for one in found)
        return after / before if before > 0 else 1.0


@contextmanager
def own_biases(teachers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the layers before the cut keep the biases that they have now: the layers in their places change the same."""
    shared = {teacher: bias for teacher in teachers if (bias := dense_bias(teacher)) is not None}
    owners = {one: one.decoder if isinstance(one, FactorizedLayer) else one for one in shared}
    try:
        for teacher, bias in shared.items():
            owners[teacher]._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
        yield
    finally:
        for teacher, bias in shared.items():
            owners[teacher]._parameters["bias"] = bias


def _results(kind: type[FactorizedLayer], layer: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return outputs position by position, and which positions of all they are."""
    rows = kind.results(layer, outputs)
    chosen = spread(rows.shape[1], rows.device)
    return rows if chosen is None else rows[:, chosen], chosen


def _stacked(rows: Tensor, missing: Tensor) -> Tensor:
    """Put rows, what is missing, and one side by side; in float64, for rounded products would fill what is empty."""
    return torch.cat([rows, missing, torch.ones_like(rows[..., :1])], dim=2)
