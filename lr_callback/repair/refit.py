"""Refit: the factors of a cut model, by least squares on what comes into its layers, layer after layer.

Truncation, slice by slice, is best for each slice alone. The outputs of the whole layer, on the inputs that the layers
before it really give, can be had closer to those before the cut: with the encoder fixed, the decoder is a linear
regression, ``D = E[y z^T] E[z z^T]^-1``, with an intercept where the layer has a bias; and encoder and decoder can be
found in turn (:mod:`lr_callback.mathematics.alternate`). Directions that the batches do not show keep what they had.
Last, the BatchNorm layers are rebased (:mod:`lr_callback.repair.rebasing`), so that training goes on from what the
model then is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from lr_callback.calibration.collect import add_rows, merged
from lr_callback.common.processes import Processes
from lr_callback.common.table import listed
from lr_callback.common.untouched import as_written, putting_back, untouched
from lr_callback.edits.surgery import standing_in
from lr_callback.layers import FactorizedLayer
from lr_callback.mathematics.moments import SecondMoments, summed
from lr_callback.model.following import look
from lr_callback.model.running import run_batches, runner
from lr_callback.repair.fitting import Fit, fit_of, own_biases
from lr_callback.repair.lockstep import Walk, mixed, walks
from lr_callback.repair.rebasing import rebasing
from lr_callback.repair.station import Station
from lr_callback.units.latency import Progress

Batch = TypeVar("Batch")
Inputs = Literal["cut", "dense"]
Factors = Literal["both", "decoder"]

_TROUBLE = "its outputs on the calibration batches cannot be compared"


def refit_(
    model: nn.Module,
    replaced: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    forward: Callable[[Batch], object] | None = None,
    inputs: Inputs = "cut",
    factors: Factors = "both",
    gentle: bool = False,
    biases: bool = True,
    rebase: bool = True,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Refit each factorized layer to the layer that it stands for, in place, all or nothing; rebase BatchNorm.

    Args:
        model: that was cut; in eval mode, without gradients, while it is run.
        replaced: name of a factorized layer -> the layer before the cut (:attr:`SurgeryReport.replaced`).
        batches: of the training, with its augmentation; run again for each layer. Some hundred images, or more where
            layers are wide.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
        inputs: ``cut``: the layers one after the other in the order of their calls, each on the inputs that the layers
            before, cut and refitted, give it; in two runs of the model, layer by layer for all batches together,
            which holds what the runs are at in memory. A layer that is called several times is fitted as in ``dense``;
            so are all, of a model that keeps tensors on itself from layer to layer, with a warning.
            ``dense``: all at once on the inputs that they had before the cut, in one run; less accurate.
        factors: ``both``: encoder and decoder in turn (:mod:`lr_callback.mathematics.alternate`), where the decoder has
            no kernel and a position has at most :data:`~lr_callback.calibration.collect.LARGEST` inputs; else, and for
            ``decoder``, the decoder alone.
        gentle: do what can be done, without warnings: of a layer that is seen at fewer than two positions for each of
            its inputs, or whose factors as found on half of the images do not serve the others, change the mean alone
            of what it gives.
        biases: whether the mean of a layer's outputs may change: its bias, or that of the BatchNorm that takes them.
        rebase: whether BatchNorm layers are rebased.
        processes: of a distributed run, each with batches of its own; all get the same decoders. None: this one alone.
        progress: told of each layer before it is refitted.

    Returns:
        Layer name -> the fraction of the squared error of its outputs that is left. Layers that are not called on the
        batches are not refitted: they are told of in a warning, and have no entry.

    Raises:
        ValueError: If there are no batches, ``inputs`` is another word, or values are not finite (the layer is named).

    Source: regression in place of the truncated factors, layer by layer on the inputs of the cut network, as in Zhang
    et al., arXiv 1505.06798, section 3.3, without their nonlinear part.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> from lr_callback.edits.surgery import factorize_
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> left = refit_(model, report.replaced, [torch.randn(256, 64)])
        >>> left["0"] <= 1
        True
    """
    if inputs not in ("cut", "dense"):
        raise ValueError(f"`inputs` must be 'cut' or 'dense', got {inputs!r}.")
    if factors not in ("both", "decoder"):
        raise ValueError(f"`factors` must be 'both' or 'decoder', got {factors!r}.")
    layers = {name: model.get_submodule(name) for name in replaced}
    students = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLayer)}
    fits = {name: fit_of(layer, replaced[name], factors == "decoder", biases) for name, layer in students.items()}
    put_back = putting_back(value for layer in students.values() for value in _values(layer))
    processes = processes or Processes()
    before = standing_in(model, {layer: replaced[name] for name, layer in students.items()})
    around = rebasing(model, before, batches, forward, processes) if rebase else nullcontext()
    try:
        with torch.no_grad(), own_biases(replaced[name] for name in students), around:
            refit = _Refit(model, fits, batches, forward, processes, progress, gentle)
            calls = refit.look()
            left = refit.one_by_one(calls) if inputs == "cut" else refit.all_at_once()
            for fit in fits.values():
                fit.settle()
        return left
    except BaseException:
        put_back()
        raise


def _values(layer: FactorizedLayer) -> list[Tensor]:
    """Return the factors, and the bias if there is one."""
    return [*(factor.data for factor in layer.factors), *([] if layer.bias is None else [layer.bias.data])]


class _Refit:
    """One refit of a model.

    Args:
        model: that holds the students.
        fits: layer name -> what is measured of it, and done.
        batches: see :func:`refit_`.
        forward: see :func:`refit_`.
        processes: see :func:`refit_`.
        progress: see :func:`refit_`.
        gentle: see :func:`refit_`.
    """

    def __init__(
        self,
        model: nn.Module,
        fits: Mapping[str, Fit],
        batches: Sequence[object],
        forward: Callable[[Any], object] | None,
        processes: Processes,
        progress: Progress | None,
        gentle: bool,
    ) -> None:
        self._model, self._fits, self._progress, self._gentle = model, fits, progress, gentle
        self._batches, self._forward, self._processes = batches, forward, processes
        self._instead: dict[nn.Module, nn.Module] = {fit.student: fit.teacher for fit in fits.values()}

    def all_at_once(self, only: Collection[str] | None = None) -> dict[str, float]:
        """Refit every layer, or some, on the inputs that it had before the cut."""
        names = {fit.teacher: name for name, fit in self._fits.items() if only is None or name in only}
        moments: dict[str, SecondMoments] = {}

        def see(teacher: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
            add_rows(moments, names[teacher], self._fits[names[teacher]].rows(inputs, outputs), _TROUBLE)

        def measure() -> dict[str, SecondMoments]:
            with standing_in(self._model, self._instead):
                run_batches(self._model, self._batches, self._forward, names, see)
            return {name: one.cpu() for name, one in moments.items()}

        found = merged(self._processes.gather(measure, long=True))
        if only is None:
            self._warn_of_unseen(found)
        self._warn_of_few([name for name, one in found.items() if self._is_few(name, [one])])
        left: dict[str, float] = {}
        for name in self._told([name for name in self._fits if name in found]):
            left |= self._solve(name, [found[name]])
        return left

    def one_by_one(self, calls: Mapping[str, int]) -> dict[str, float]:
        """Refit one layer after the other, in the order of their calls, on the inputs of the model as it stands."""
        self._warn_of_unseen(calls, "first calibration batch")
        often = {name for name, times in calls.items() if times > 1}
        # A layer that is called several times has inputs that depend on itself: it is fitted to those before the cut.
        left = self.all_at_once(often) if often else {}
        stations = {name: Station(name, fit) for name, fit in self._fits.items()}
        run = runner(self._model, self._forward)
        runs = [partial(run, batch) for batch in self._batches]
        instead: dict[nn.Module, nn.Module] = {self._fits[name].student: one.dense for name, one in stations.items()}
        rest = [name for name in calls if name not in often]
        with untouched(self._model), as_written(), standing_in(self._model, instead):
            if not any(self._processes.gather(partial(self._is_mixed, runs, stations.values()), long=True)):
                with walks(runs, before=True) as before, walks(runs, before=False) as after:
                    return left | self._walk(rest, stations, before, after)
        self._warn_of_mixed()
        return left | self.all_at_once(rest)

    def _is_mixed(self, runs: Sequence[Callable[[], object]], stations: Iterable[Station]) -> bool:
        """Return whether runs that wait for each other are not those that they are alone."""
        with standing_in(self._model, {one.dense: one.fit.teacher for one in stations}):
            before = runs[0]()
        return mixed((runs[0], runs[-1]), (before, runs[-1]()))

    def _walk(
        self, order: Sequence[str], stations: Mapping[str, Station], before: Sequence[Walk], after: Sequence[Walk]
    ) -> dict[str, float]:
        """Take all runs from layer to layer, and refit each one as they come to it."""
        left: dict[str, float] = {}
        few: list[str] = []
        for name in set(stations) - set(order):
            stations[name].is_open = True
        for name in self._told(order):
            found = self._processes.gather(partial(self._measure, name, before, after), long=True)
            parts = [half[name] for one in zip(*found, strict=True) if name in (half := merged(one))]
            if parts:
                few += [name] if self._is_few(name, parts) else []
                left |= self._solve(name, parts)
            stations[name].refresh()
            for walk in after:
                walk.at = None if walk.at == name else walk.at
        self._warn_of_few(few)
        return left

    def _measure(self, name: str, before: Sequence[Walk], after: Sequence[Walk]) -> list[dict[str, SecondMoments]]:
        """Return the moments of the runs that wait at a layer, by its name, of every second run each; none waits: none.

        Of a run alone it is the first images and the last ones.
        """
        halves: list[dict[str, SecondMoments]] = [{}, {}]
        is_alone = len(before) == 1 and self._processes.size == 1
        for index, (one, other) in enumerate(zip(before, after, strict=True), self._processes.rank):
            if other.at is None:
                other.step()
            wanted = one.step_to(name) if other.at == name else None
            if wanted is None or other.tensor is None:
                continue
            for half, rows in enumerate(self._fits[name].halves(other.tensor, wanted, is_alone), index):
                add_rows(halves[half % 2], name, rows, _TROUBLE)
        return [{name: one.cpu() for name, one in half.items()} for half in halves]

    def look(self) -> dict[str, int]:
        """Return how often each student is called on a batch, in the order of the first calls; note what follows it."""
        students = {name: fit.student for name, fit in self._fits.items()}
        calls, norms = look(self._model, self._batches, self._forward, students, self._processes)
        for name, norm in norms.items():
            self._fits[name].norm = norm if self._fits[name].student.bias is None else None
        return calls

    def _solve(self, name: str, parts: Sequence[SecondMoments]) -> dict[str, float]:
        """Change one layer; return the fraction of the squared error that is left, nothing if only its mean changed."""
        fit = self._fits[name]
        if self._gentle and self._is_few(name, parts):
            fit.level(summed(parts))
            return {}
        return {name: fit.solve([one.to(fit.student.factors[0].device) for one in parts], self._gentle)}

    def _told(self, names: Collection[str]) -> Iterator[str]:
        """Go through layers, and tell of each."""
        for done, name in enumerate(names):
            if self._progress is not None:
                self._progress(done, len(names), name)
            yield name

    def _is_few(self, name: str, parts: Sequence[SecondMoments]) -> bool:
        """Return whether a layer was seen at hardly more positions than there are inputs to fit to."""
        return bool(sum(one.count for one in parts) < 2 * self._fits[name].width)

    def _warn_of_few(self, few: Sequence[str]) -> None:
        if few and not self._gentle and self._processes.rank == 0:
            warn(
                f"The calibration batches are few for {len(few)} layer(s) ({listed(few)}): it is fitted to less than "
                "two positions for each of its inputs, and may be worse on others; give more batches.",
                stacklevel=5,
            )

    def _warn_of_mixed(self) -> None:
        if not self._gentle and self._processes.rank == 0:
            warn(
                "The model keeps what a run needs from layer to layer where another run finds it, such as a tensor as "
                "an attribute: the layers are refitted to the inputs that they had before the cut, as for "
                "inputs='dense'. For those after it, let the model hand such values on as arguments.",
                stacklevel=5,
            )

    def _warn_of_unseen(self, seen: Iterable[str], where: str = "calibration batches") -> None:
        names = set(self._fits) - set(seen)
        if names and not self._gentle and self._processes.rank == 0:
            warn(
                f"{len(names)} layer(s) are not called on the {where} and keep the factors that they have: "
                f"{listed(sorted(names), 5)}. Give batches that reach them, or name them in `exclude`.",
                stacklevel=5,
            )
