"""Importance: how much each direction of a layer's inputs, and each of its outputs, counts when it is cut.

Without it an error is of the weight alone. With the second moments ``C = E[x x^T]`` of the inputs as they come, the
Frobenius norm of ``(W - What) L``, ``L L^T = C``, is the root mean square of what the outputs are off: what hardly ever
comes may be cut for nothing. Weights ``d`` of the outputs scale the rows, ``diag(d)^(1/2) (W - What) L``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from numbers import Real
from warnings import warn

import torch
from torch import Tensor

from lr_callback.common.table import listed
from lr_callback.mathematics.folding import Geometry, decoder_axes, fold


@dataclass(frozen=True)
class Importance:
    """What is known about one layer's inputs and outputs, and about the layer among others.

    Args:
        inputs: second moments ``(g, s, s)``, float64, of what each group's weight is multiplied with: ``s`` is
            ``C / g * prod(kernel)``, or ``C / g``, the same then at each kernel position, and none between positions;
            or ``(g, s)``, their diagonals. None: all inputs count the same.
        means: of the inputs, ``(g, s)``, where a constant error of the outputs is made up for, by a bias or by the
            BatchNorm after the layer: what counts then is how the inputs vary, ``E[x x^T] - E[x] E[x]^T``. None: all
            of the error counts.
        outputs: weights ``(F,)`` of the squared error of each output, at least 0. None: all outputs count the same.
        weight: of the layer's error, to the power of the objective, among those of the other layers; at least 0. None:
            not known.

    Raises:
        ValueError: If a shape, or a value (NaN, infinity, a negative mean square), cannot be that.

    Example::

        >>> Importance(inputs=torch.ones(1, 6)).inputs.shape
        torch.Size([1, 6])
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    weight: float | None = None
    means: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what no inputs or outputs can have given."""
        if self.inputs is not None:
            _check("inputs", self.inputs, self.inputs.dim() == 2 or _is_square(self.inputs), "(g, s, s) or (g, s)")
        if self.means is not None:
            _check_means(self.means, self.inputs)
        if self.outputs is not None:
            _check("outputs", self.outputs, self.outputs.dim() == 1, "(F,)")
        if self.weight is not None and not (isinstance(self.weight, Real) and 0 <= float(self.weight) < inf):
            raise ValueError(f"`importance.weight` must be a finite number, at least 0, got {self.weight!r}.")

    @property
    def is_of_weight(self) -> bool:
        """Whether an error of the weight alone takes it: nothing is known about inputs and outputs."""
        return self.inputs is None and self.outputs is None

    def check_fits(self, geometry: Geometry) -> None:
        """Refuse what is of a layer of other sizes.

        Raises:
            ValueError: If it is.
        """
        channels, kernel = geometry.in_channels // geometry.groups, prod(geometry.kernel)
        if self.inputs is not None and (
            self.inputs.shape[0] != geometry.groups or self.inputs.shape[1] not in (channels, channels * kernel)
        ):
            raise ValueError(
                f"`importance.inputs` must be of {geometry.groups} group(s) of {channels} or {channels * kernel} "
                f"inputs, as the layer has them, got shape {tuple(self.inputs.shape)}."
            )
        if self.outputs is not None and len(self.outputs) != geometry.out_channels:
            raise ValueError(
                f"`importance.outputs` must have one weight for each of the layer's {geometry.out_channels} outputs, "
                f"got {len(self.outputs)}."
            )

    @property
    def _varying(self) -> Tensor | None:
        """Second moments of the inputs, about the means that are known."""
        if self.inputs is None or self.means is None:
            return self.inputs
        if self.inputs.dim() == 2:
            return (self.inputs - self.means**2).clamp(min=0)
        means = self.means.to(self.inputs)
        varying = torch.baddbmm(self.inputs, means.unsqueeze(2), means.unsqueeze(1), alpha=-1)
        # What rounding has made of inputs that hardly vary may be negative, by a part of what they were.
        squares, size = self.inputs.diagonal(dim1=1, dim2=2), self.inputs.shape[1]
        varying.diagonal(dim1=1, dim2=2).add_(size * torch.finfo(squares.dtype).eps * squares.amax(1, keepdim=True))
        return varying

    def shrunk(self, shrinkage: float) -> Importance:
        """Return it with second moments on the way from those that were seen to equal ones, for errors and factors.

        ``(1 - s) C + s t I``, with ``C`` the moments about the means that are known, and ``t`` the mean of its diagonal
        over all groups; the means are in it, then. Training changes the inputs of a layer, and what does not occur now
        may occur then.

        Args:
            shrinkage: ``s``, 0 to 1.

        Source: the form of Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices"
        (2004), where ``s`` is estimated; here it is given.

        Example::

            >>> Importance(torch.tensor([[4.0, 0.0]])).shrunk(0.5).inputs
            tensor([[3., 1.]])
        """
        varying = self._varying
        if varying is None or shrinkage == 0:
            return self
        varying = varying if varying.is_floating_point() else varying.double()
        diagonal = varying if varying.dim() == 2 else varying.diagonal(dim1=1, dim2=2)
        mixed, equal = (1 - shrinkage) * varying, shrinkage * diagonal.mean()
        (mixed if varying.dim() == 2 else mixed.diagonal(dim1=1, dim2=2)).add_(equal)
        return replace(self, inputs=mixed, means=None)

    def shift(self, change: Tensor) -> Tensor | None:
        """Return what a change of the weight changes the mean of the outputs by; None where that counts as an error.

        Args:
            change: of the dense weight, ``(F, C / g, *kernel)``.

        Returns:
            ``(F,)`` float64, on the device of the change.
        """
        if self.means is None:
            return None
        means = self.means.to(change.device)
        columns = change.double().reshape(means.shape[0], -1, change.shape[1], prod(change.shape[2:]))
        per = means.reshape(means.shape[0], 1, change.shape[1], -1)  # each position's own, or the same at all
        return (columns * per).sum((2, 3)).flatten()

    def of_columns(self, geometry: Geometry, folding: str) -> Tensor | None:
        """Return the second moments of the columns of a layer that is folded with one slice.

        Args:
            geometry: of the layer.
            folding: a name in :data:`~lr_callback.mathematics.folding.FOLDINGS`. Kernel axes that go to the decoder
                leave the
                columns: their moments are averaged, which is exact as far as all positions of an image are alike.

        Returns:
            ``(g, c, c)`` or ``(g, c)``, ``c`` columns in the order of :func:`~lr_callback.mathematics.folding.fold`;
            None if all inputs count the same.
        """
        inputs = self._varying
        if inputs is None:
            return None
        own = decoder_axes(folding, len(geometry.kernel))
        channels, encoder = geometry.in_channels // geometry.groups, prod(geometry.encoder_kernel(folding))
        if inputs.shape[1] == channels:
            return _at_each_position(inputs, encoder)
        if not own:
            return inputs
        axes = range(len(geometry.kernel))
        order = [*own, *(axis for axis in axes if axis not in own)]
        sizes, decoder = (channels, *geometry.kernel), prod(geometry.decoder_kernel(folding))
        first = [1, *(2 + axis for axis in order)]
        if inputs.dim() == 2:
            split = inputs.reshape(-1, *sizes).permute(0, *first)
            return split.reshape(-1, channels, decoder, encoder).mean(2).flatten(1)
        second = [len(sizes) + one for one in first]
        split = inputs.reshape(-1, *sizes, *sizes).permute(0, *first, *second)
        joined = split.reshape(-1, channels, decoder, encoder, channels, decoder, encoder)
        return joined.diagonal(dim1=2, dim2=5).mean(-1).reshape(-1, channels * encoder, channels * encoder)

    def of_rows(self, geometry: Geometry, folding: str) -> Tensor | None:
        """Return what the rows of a folded layer are multiplied with, ``(g, F / g * D, 1)``, roots of the weights.

        None of them is zero, for the factors are divided by them: the smallest is a millionth of the largest.
        """
        if self.outputs is None:
            return None
        roots = self.outputs.double().sqrt()
        largest = roots.amax()
        roots = roots.clamp(min=largest * 1e-6) if largest > 0 else torch.ones_like(roots)
        repeated = roots.repeat_interleave(prod(geometry.decoder_kernel(folding)))
        return repeated.reshape(geometry.groups, -1, 1)


def weighted_fold(
    weight: Tensor, folding: str, geometry: Geometry, importance: Importance
) -> tuple[Tensor, Tensor | None]:
    """Fold a layer with one slice, its rows scaled by the roots of their weights.

    Args:
        weight: ``(F, C / g, *kernel)``.
        folding: a name in :data:`~lr_callback.mathematics.folding.FOLDINGS`.
        geometry: of the layer.
        importance: of its inputs and outputs.

    Returns:
        ``(g, F / g * D, C / g * E)``, and the second moments of its columns or None.
    """
    matrix, rows = fold(weight, folding, 1, geometry.groups), importance.of_rows(geometry, folding)
    scaled = matrix if rows is None else matrix.double() * rows.to(matrix.device)
    columns = importance.of_columns(geometry, folding)
    return scaled, None if columns is None else columns.to(matrix.device)


WEIGHTED: Mapping[str, str] = {
    "activation": "the second moments of the layers' inputs, `collect_moments(model, batches)`",
    "batchnorm": "what the BatchNorm after each layer makes of its outputs, `batchnorm_importance(model, batches)`",
    "fisher": "the mean squared gradients of the layers' weights, `fisher_importance(model, batches, loss)` or "
    "`fisher_importance(model, optimizers=...)`",
}
"""Errors that are weighted by the layers' importance -> what it is made of, and how."""


def checked_importance(
    error: str, importance: Mapping[str, Importance] | None, effects: bool | None = None
) -> Mapping[str, Importance]:
    """Return the importance of layers for an error, nothing for one that is of the weights alone.

    Args:
        error: that is weighted, or not.
        importance: layer name -> of its inputs and outputs.
        effects: whether layers are to have weights of their own; None: they may.

    Raises:
        ValueError: If the error is weighted and there is none, or the other way round; or if no layer has a weight
            where they are to.
    """
    known = importance or {}
    if error in WEIGHTED and not known:
        raise ValueError(f"error={error!r} is weighted: `importance` must be {WEIGHTED[error]}, got none.")
    if effects and all(one.weight is None for one in known.values()):
        raise ValueError(
            "objective='loss' weighs each layer's error by its effect: `importance` must have the layers' weights, "
            "`measure_effects(model, batches, method, importance)`, got none."
        )
    if error in WEIGHTED or not known or (effects is not False and all(one.is_of_weight for one in known.values())):
        return known
    raise ValueError(
        f"`importance` is for the errors {', '.join(WEIGHTED)}; error={error!r} is of the weights alone. Leave it out, "
        "or choose one of these errors."
    )


def warn_of_unknown(names: Sequence[str], importance: Mapping[str, Importance]) -> None:
    """Warn of layers whose importance is not known, as of one that was not called while it was measured."""
    unknown = [name for name in names if name not in importance]
    if importance and unknown:
        warn(
            f"The importance of {len(unknown)} layer(s) is not known, as if they were never called: all of their "
            f"inputs and outputs count the same. They are {listed(unknown, 5)}.",
            stacklevel=4,
        )


def _is_square(moments: Tensor) -> bool:
    return moments.dim() == 3 and moments.shape[1] == moments.shape[2]


def _check_means(means: Tensor, inputs: Tensor | None) -> None:
    if inputs is None or means.shape != inputs.shape[:2] or not bool(torch.isfinite(means).all()):
        wanted = "`inputs` beside them" if inputs is None else f"finite values of the shape {tuple(inputs.shape[:2])}"
        raise ValueError(f"`importance.means` must have {wanted}, as `collect_moments` gives them, got {means}.")


def _check(name: str, values: Tensor, fits: bool, shape: str) -> None:
    if not fits:
        raise ValueError(f"`importance.{name}` must have the shape {shape}, got {tuple(values.shape)}.")
    squares = values.diagonal(dim1=1, dim2=2) if values.dim() == 3 else values
    if not bool(torch.isfinite(values).all()) or bool((squares < 0).any()):
        raise ValueError(f"`importance.{name}` must be finite mean squares, at least 0; found NaN, infinity or less.")


def _at_each_position(moments: Tensor, positions: int) -> Tensor:
    """Repeat the moments of channels for each kernel position, with none between positions."""
    if moments.dim() == 2:
        return moments.repeat_interleave(positions, dim=1)
    apart = torch.eye(positions, dtype=moments.dtype, device=moments.device)
    size = moments.shape[1] * positions
    return torch.einsum("gab,pq->gapbq", moments, apart).reshape(-1, size, size)
