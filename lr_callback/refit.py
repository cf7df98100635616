"""Refit: the decoders of a cut model, by least squares on what its encoders let through.

With the encoder of a layer fixed, the decoder that brings its outputs ``D z`` closest to those of the layer before the
cut, ``y``, is a linear regression: ``D = E[y z^T] E[z z^T]^-1``, with an intercept where the layer has a bias. It picks
up what truncation slice by slice leaves out, and, layer after layer, what the layers before have changed.

Written for what is missing, ``e = y - D z``: the decoder changes by ``E[e z^T] (E[z z^T] + ridge)^-1``. Directions that
the batches do not show keep the decoder that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from lr_callback.collect import run_batches, some, watching
from lr_callback.layer_types import layer_type
from lr_callback.layers import FactorizedLayer, dense_bias
from lr_callback.moments import SecondMoments
from lr_callback.surgery import standing_in

Batch = TypeVar("Batch")
Inputs = Literal["cut", "dense"]

RIDGE = 1e-6
"""Of the mean square of what encoders let through; it decides where the batches leave the decoder open."""


def refit_(
    model: nn.Module,
    replaced: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    forward: Callable[[Batch], object] | None = None,
    inputs: Inputs = "cut",
    reduce: Callable[[SecondMoments], None] | None = None,
) -> dict[str, float]:
    """Refit the decoder of each factorized layer to the layer that it stands for, in place, all or nothing.

    Args:
        model: that was cut; in eval mode, without gradients, while it is run.
        replaced: name of a factorized layer -> the layer before the cut (:attr:`SurgeryReport.replaced`).
        batches: of the training, with its augmentation; run again for each layer. Some hundred images, or more where
            layers are wide.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect.collect_moments`.
        inputs: ``cut``: the layers one after the other in the order of their calls, each on the inputs that the layers
            before, cut and refitted, give it. It takes two runs of a part of the model for each layer. ``dense``: all
            at once on the inputs that they had before the cut, in one run; less accurate.
        reduce: adds up moments over the processes of a distributed run; None: this process alone.

    Returns:
        Layer name -> the fraction of the squared error of its outputs that is left. Layers that are not called on the
        batches are not refitted: they are told of in a warning, and have no entry.

    Raises:
        ValueError: If there are no batches, ``inputs`` is another word, or values are not finite (the layer is named).

    Source: regression in place of the truncated factors, layer by layer on the inputs of the cut network, as in Zhang
    et al., arXiv 1505.06798, section 3.3, without their nonlinear part.

    Example::

        >>> from lr_callback.analysis import allocate
        >>> from lr_callback.surgery import factorize_
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> left = refit_(model, report.replaced, [torch.randn(256, 64)])
        >>> left["0"] <= 1
        True
    """
    if inputs not in ("cut", "dense"):
        raise ValueError(f"`inputs` must be 'cut' or 'dense', got {inputs!r}.")
    layers = {name: model.get_submodule(name) for name in replaced}
    students = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLayer)}
    teachers = {name: replaced[name] for name in students}
    kept = {name: [value.clone() for value in _decoder(layer)] for name, layer in students.items()}
    try:
        with torch.no_grad(), _own_biases(teachers.values()):
            refit = _Refit(model, students, teachers, batches, forward, reduce)
            return refit.one_by_one() if inputs == "cut" else refit.all_at_once()
    except BaseException:
        with torch.no_grad():
            for name, layer in students.items():
                for value, former in zip(_decoder(layer), kept[name], strict=True):
                    value.copy_(former)
        raise


def _decoder(layer: FactorizedLayer) -> list[Tensor]:
    """Return the decoder's weight, and its bias if there is one."""
    return [layer.factors[1].data, *([] if layer.bias is None else [layer.bias.data])]


@contextmanager
def _own_biases(teachers: Iterable[nn.Module]) -> Iterator[None]:
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


class _EnoughError(Exception):
    """A run of the model can stop: what it was for has been seen."""


class _Refit:
    """One refit of a model.

    Args:
        model: that holds the students.
        students: layer name -> factorized layer.
        teachers: layer name -> the layer before the cut.
        batches: see :func:`refit_`.
        forward: see :func:`refit_`.
        reduce: see :func:`refit_`.
    """

    def __init__(
        self,
        model: nn.Module,
        students: Mapping[str, FactorizedLayer],
        teachers: Mapping[str, nn.Module],
        batches: Sequence[object],
        forward: Callable[[Any], object] | None,
        reduce: Callable[[SecondMoments], None] | None,
    ) -> None:
        self._model, self._students, self._teachers = model, students, teachers
        self._batches, self._forward, self._reduce = batches, forward, reduce
        self._instead: dict[nn.Module, nn.Module] = {layer: teachers[name] for name, layer in students.items()}
        self._names: dict[nn.Module, str] = {layer: name for name, layer in students.items()}

    def all_at_once(self) -> dict[str, float]:
        """Refit every layer on the inputs that it had before the cut."""
        names = {teacher: name for name, teacher in self._teachers.items()}
        moments: dict[str, SecondMoments] = {}

        def see(teacher: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
            name = names[teacher]
            through, given = _through(self._students[name], inputs, outputs)
            _add(moments, name, self._students[name], through, given, outputs)

        with standing_in(self._model, self._instead):
            run_batches(self._model, self._batches, self._forward, names, see)
        self._warn_of_unseen(moments)
        return {name: self._solve(name, moments[name]) for name in self._students if name in moments}

    def one_by_one(self) -> dict[str, float]:
        """Refit one layer after the other, in the order of their calls, on the inputs of the model as it stands."""
        calls: dict[nn.Module, int] = {}

        def count(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
            calls[layer] = calls.get(layer, 0) + 1

        run_batches(self._model, self._batches[:1], self._forward, self._students.values(), count)
        names = self._names
        self._warn_of_unseen([names[layer] for layer in calls])
        left: dict[str, float] = {}
        for layer, times in calls.items():
            moments: dict[str, SecondMoments] = {}
            for batch in self._batches:
                self._compare(names[layer], times, batch, moments)
            left[names[layer]] = self._solve(names[layer], moments[names[layer]])
        return left

    def _compare(self, name: str, times: int, batch: object, moments: dict[str, SecondMoments]) -> None:
        """Run a batch through both models as far as a layer, and add what it lets through and what is missing."""
        student, teacher = self._students[name], self._teachers[name]
        wanted: list[Tensor] = []
        with standing_in(self._model, self._instead), _until(teacher, times, lambda _, out: wanted.append(out)) as see:
            self._run(batch, teacher, see)

        def compare(inputs: Tensor, given: Tensor) -> None:
            _add(moments, name, student, inputs, given, wanted.pop(0))

        with _until(student.decoder, times, compare) as see:
            self._run(batch, student.decoder, see)

    def _run(self, batch: object, layer: nn.Module, see: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
        with suppress(_EnoughError):
            run_batches(self._model, [batch], self._forward, [layer], see)

    def _solve(self, name: str, moments: SecondMoments) -> float:
        """Change one decoder; return the fraction of the squared error that is left."""
        if self._reduce is not None:
            self._reduce(moments)
        student = self._students[name]
        encoder, decoder = student.ordered_factors
        change, shift, left = _regress(moments, decoder.shape[1] * decoder[0, 0].numel(), student.bias is not None)
        student.set_factors(encoder, decoder.double() + change.reshape(decoder.shape))
        if student.bias is not None:
            student.bias.add_(shift.reshape(-1))
        return left

    def _warn_of_unseen(self, seen: Iterable[str]) -> None:
        names = set(self._students) - set(seen)
        if names:
            warn(
                f"{len(names)} layer(s) are not called on the calibration batches and keep the decoder that they have: "
                f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}.",
                stacklevel=5,
            )


@contextmanager
def _until(
    layer: nn.Module, times: int, see: Callable[[Tensor, Tensor], None]
) -> Iterator[Callable[[nn.Module, Tensor, Tensor], None]]:
    """Give what tells of the calls of a layer, and ends the run of the model after so many."""
    left = times

    def tell(_: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        nonlocal left
        see(inputs, outputs)
        left -= 1
        if not left:
            raise _EnoughError

    yield tell


def _through(student: FactorizedLayer, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a student's decoder takes and gives for the inputs of a call that gave outputs of these sizes."""
    seen: list[tuple[Tensor, Tensor]] = []
    sized = [list(outputs.shape)] if getattr(student, "transposed", False) else []
    with watching([student.decoder], lambda _, through, given: seen.append((through, given))):
        student.forward(inputs, *sized)
    return seen[0]


def _add(
    moments: dict[str, SecondMoments],
    name: str,
    student: FactorizedLayer,
    through: Tensor,
    given: Tensor,
    wanted: Tensor,
) -> None:
    """Add the moments of what comes to a decoder, of what its outputs lack, and of one, which gives the means."""
    kind = layer_type(student.decoder)
    assert kind is not None
    rows = kind.patches(student.decoder, through, given)
    assert rows is not None
    missing = kind.results(student.decoder, wanted.to(given.dtype) - given)
    rows, missing = some(rows).double(), some(missing).double()  # rounded products would fill directions that are empty
    stacked = torch.cat([rows, missing, torch.ones_like(rows[..., :1])], dim=2)
    if name not in moments:
        moments[name] = SecondMoments(stacked.shape[2], stacked.shape[0], sync_on_compute=False).to(stacked.device)
    try:
        moments[name].update(stacked)
    except ValueError as error:
        raise ValueError(f"{name}: its outputs on the calibration batches cannot be compared. {error}") from error


def _regress(moments: SecondMoments, width: int, intercept: bool) -> tuple[Tensor, Tensor, float]:
    """Solve for the change of a decoder.

    Args:
        moments: of rows ``[z, e, 1]``.
        width: entries of ``z``.
        intercept: whether the bias may change, too.

    Returns:
        The change ``(g, F / g, width)``, that of the bias ``(g, F / g)``, and the fraction of the error that is left.
    """
    both = moments.compute()
    seen, missing = slice(0, width), slice(width, both.shape[1] - 1)
    means = both[:, -1:, :-1] if intercept else torch.zeros_like(both[:, -1:, :-1])
    centered = both[:, :-1, :-1] - means.mT @ means
    squares = centered[:, seen, seen]
    ridge = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
    raised = squares + ridge[:, None, None] * torch.eye(width, dtype=both.dtype, device=both.device)
    products = centered[:, missing, seen]
    change = torch.linalg.solve(raised, products.mT).mT
    shift = (means[:, :, missing] - means[:, :, seen] @ change.mT).squeeze(1)
    gained = (2 * change * products - (change @ squares) * change).sum()
    offset = (means[:, :, missing] ** 2).sum()
    before = both[:, missing, missing].diagonal(dim1=1, dim2=2).sum()
    return change, shift, float(1 - (gained + offset) / before) if before > 0 else 1.0
