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

from lr_callback.collect import merged, run_batches, some, watching
from lr_callback.layer_types import layer_type
from lr_callback.layers import FactorizedLayer, dense_bias
from lr_callback.moments import SecondMoments
from lr_callback.processes import Processes
from lr_callback.regression import regress
from lr_callback.surgery import standing_in

Batch = TypeVar("Batch")
Inputs = Literal["cut", "dense"]


def refit_(
    model: nn.Module,
    replaced: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    forward: Callable[[Batch], object] | None = None,
    inputs: Inputs = "cut",
    processes: Processes | None = None,
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
        processes: of a distributed run, each with batches of its own; all get the same decoders. None: this one alone.

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
            refit = _Refit(model, students, teachers, batches, forward, processes or Processes())
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
        processes: see :func:`refit_`.
    """

    def __init__(
        self,
        model: nn.Module,
        students: Mapping[str, FactorizedLayer],
        teachers: Mapping[str, nn.Module],
        batches: Sequence[object],
        forward: Callable[[Any], object] | None,
        processes: Processes,
    ) -> None:
        self._model, self._students, self._teachers = model, students, teachers
        self._batches, self._forward, self._processes = batches, forward, processes
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

        def measure() -> dict[str, SecondMoments]:
            with standing_in(self._model, self._instead):
                run_batches(self._model, self._batches, self._forward, names, see)
            return {name: one.cpu() for name, one in moments.items()}

        parts = self._processes.gather(measure, long=True)
        found = {name: merged([part[name] for part in parts if name in part]) for part in parts for name in part}
        self._warn_of_unseen(found)
        self._warn_of_few({name: float(one.count) for name, one in found.items()})
        return {name: self._solve(name, found[name]) for name in self._students if name in found}

    def one_by_one(self) -> dict[str, float]:
        """Refit one layer after the other, in the order of their calls, on the inputs of the model as it stands."""
        # The order is that of the first process, and a layer that a process does not call has no moments there.
        order = self._processes.gather(self._calls, long=True)[0]
        self._warn_of_unseen(order)
        left: dict[str, float] = {}
        counts: dict[str, float] = {}
        for name in order:

            def measure(name: str = name) -> SecondMoments:
                moments: dict[str, SecondMoments] = {}
                for batch in self._batches:
                    self._compare(name, order[name], batch, moments)
                return moments[name].cpu()

            found = merged(self._processes.gather(measure, long=True))
            counts[name], left[name] = float(found.count), self._solve(name, found)
        self._warn_of_few(counts)
        return left

    def _calls(self) -> dict[str, int]:
        """Return how often each student is called on a batch, in the order of the first calls."""
        calls: dict[str, int] = {}

        def count(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
            name = self._names[layer]
            calls[name] = calls.get(name, 0) + 1

        run_batches(self._model, self._batches[:1], self._forward, self._students.values(), count)
        return calls

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
        student = self._students[name]
        encoder, decoder = student.ordered_factors
        change, shift, left = regress(moments.to(encoder.device), _width(student), student.bias is not None)
        student.set_factors(encoder, decoder.double() + change.reshape(decoder.shape))
        if student.bias is not None:
            student.bias.add_(shift.reshape(-1))
        return left

    def _warn_of_few(self, counts: Mapping[str, float]) -> None:
        """Warn of layers that were seen at hardly more positions than their decoders have inputs."""
        few = [name for name, count in counts.items() if count < 2 * _width(self._students[name])]
        if few:
            warn(
                f"The calibration batches are few for {len(few)} layer(s) ({', '.join(few[:3])}"
                f"{', ...' if few[3:] else ''}): a decoder is fitted to less than two positions for each of its "
                "inputs, and may be worse on others; give more batches.",
                stacklevel=5,
            )

    def _warn_of_unseen(self, seen: Iterable[str]) -> None:
        names = set(self._students) - set(seen)
        if names:
            warn(
                f"{len(names)} layer(s) are not called on the calibration batches and keep the decoder that they have: "
                f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}.",
                stacklevel=5,
            )


def _width(student: FactorizedLayer) -> int:
    """Return how many inputs a group of a student's decoder has, kernel positions included."""
    return student.ordered_factors[1][0].numel()


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
