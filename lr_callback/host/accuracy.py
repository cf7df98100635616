"""Accuracy: the smallest network whose accuracy, right after its cut, is hardly lower, found by trying.

Each try is a copy of the module with the layers of an allocation, repaired as the run's own cut will be. It is
validated and thrown away; the module itself has its layers back before the validation begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import ceil, isfinite

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lr_callback.common.interrupts import live
from lr_callback.common.parallel import workers
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.goals import Goal, check_goal, drop_of
from lr_callback.edits.build import build_layers, check_allocation
from lr_callback.edits.surgery import standing_in
from lr_callback.host.calibration import isolated_rng
from lr_callback.host.copies import copied_module
from lr_callback.host.logged import accuracies_in
from lr_callback.host.strategies import processes_of
from lr_callback.host.validating import INSTEAD, check_validation, validate
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers
from lr_callback.observation.progress import progress_line
from lr_callback.observation.report import quiet, show
from lr_callback.units.latency import Progress

Repair = Callable[[ExitStack, Mapping[str, nn.Module], Mapping[str, nn.Module]], None]

HALVINGS = 7
"""How often the range of what is kept is halved: to 1/128 of it."""

_GRID = 10_000
"""Fractions are tried in such parts, so that the one that is told can be given as `keep_ratio`."""

_ROUNDING = 1e-6
"""Part of a metric that is no difference: accuracies are sums in single precision."""


class Accuracy:
    """What is asked of a network's accuracy right after a cut, and the search for the smallest one that has it.

    Args:
        monitor: name of a metric that the validation logs, of which more is better; None: the one with ``acc`` in it.
        show_tries: whether to print what each try gave.

    Attributes:
        measured: accuracy before and right after the cut of the latest allocation, where one was searched for.

    Raises:
        ValueError: If the monitor is no name, or that of a loss.
    """

    def __init__(self, monitor: str | None, show_tries: bool) -> None:
        if monitor is not None and (not isinstance(monitor, str) or not monitor or "loss" in monitor.lower()):
            raise ValueError(
                "`monitor` must be the name of a metric that the validation logs and of which more is better, such as "
                f"'val_acc', or None, got {monitor!r}."
            )
        self._monitor, self._show_tries = monitor, show_tries
        self.measured: tuple[float, float] | None = None

    def check(self, trainer: Trainer, goals: Iterable[Goal]) -> None:
        """Refuse a run whose validation cannot be run in its middle, if a goal asks for that.

        Raises:
            MisconfigurationException: If it cannot.
        """
        if any(drop_of(goal) is not None for goal in goals):
            check_validation(trainer)

    def allocate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        analysis: Analysis,
        goal: Goal,
        importance: Mapping[str, Importance] | None,
        repair: Repair,
        undo: ExitStack,
    ) -> Allocation:
        """Return the allocation for a goal; one that asks for an accuracy is searched for.

        Args:
            trainer: at the start of an epoch.
            pl_module: before the cut; it is as it was afterwards.
            analysis: of it.
            goal: see :mod:`lr_callback.decisions.goals`.
            importance: what the analysis was made with.
            repair: called with what takes back what it does to the module, and the layers before and after.
            undo: given what takes back each try, for one whose very end is interrupted.

        Raises:
            ValueError: If the goal cannot be met.
            MisconfigurationException: If an accuracy cannot be measured. Nothing was changed.
        """
        self.measured = None
        if drop_of(goal) is None:
            return processes_of(trainer).first(lambda: analysis.allocate(goal))
        check_validation(trainer)
        drop = drop_of(check_goal(goal))
        assert drop is not None
        # The lines of the tries say as much as plain lines of progress.
        with progress_line(trainer, "search", "try", plain=not self._show_tries) as progress:
            tries = _Tries(trainer, pl_module, importance, repair, undo, progress)
            return self._search(trainer, analysis, tries, drop)

    def _search(self, trainer: Trainer, analysis: Analysis, tries: _Tries, drop: float) -> Allocation:
        logged = tries.measure(None)
        name = self._metric(logged)
        least = logged[name] - drop - _ROUNDING * max(1.0, abs(logged[name]))
        self._tell(trainer, f"{name} is {logged[name]:.4f} and may fall by {drop:g}; searching")

        values = {1.0: logged[name]}

        def holds(ratio: float) -> bool:
            values[ratio] = value = tries.measure(analysis.allocate(ratio)).get(name, float("nan"))
            self._tell(trainer, f"keep {ratio:g}: {name} {value:.4f} ({value - logged[name]:+.4f})")
            return value >= least

        found = _found(_smallest(analysis.reachable[0], holds), name, drop)
        self.measured = logged[name], values[found]
        return analysis.allocate(found)

    def _metric(self, logged: Mapping[str, float]) -> str:
        """Return the name of the metric, which has a value for the network as it is."""
        name = self._monitor or _the_accuracy(logged)
        if name not in logged or not isfinite(logged[name]):
            raise MisconfigurationException(
                f"LowRankCompression: `monitor`={name!r} must be a finite metric that the validation logs, and of the "
                f"network before the cut it is {logged.get(name, 'not logged')}; the validation logged "
                f"{_names(logged)}. Nothing was changed."
            )
        return name

    def _tell(self, trainer: Trainer, text: str) -> None:
        if self._show_tries:
            show(trainer, f"Low-rank compression: {text}")


def _the_accuracy(logged: Mapping[str, float]) -> str:
    """Return the one name that can only be that of the accuracy.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    found = accuracies_in(logged)
    if len(found) != 1:
        raise MisconfigurationException(
            "LowRankCompression: without `monitor` the validation must log one metric with 'acc' in its name, found "
            f"{_names(found)}; the validation logged {_names(logged)}. Name the metric by `monitor`. Nothing was "
            "changed."
        )
    return found[0]


def _names(logged: Iterable[str]) -> str:
    return ", ".join(sorted(logged)) or "nothing"


def _smallest(reachable: float, holds: Callable[[float], bool]) -> float | None:
    """Return the smallest fraction of those tried that holds; None if none does.

    Example::

        >>> _smallest(0.1, lambda ratio: ratio >= 0.3), _smallest(0.1, lambda ratio: False)
        (0.3039, None)
    """
    low, high, found = min(1.0, ceil(reachable * _GRID) / _GRID), 1.0, None
    if holds(low):
        return low
    for _ in range(HALVINGS):
        middle = round((low + high) / 2, 4)
        if not low < middle < high:
            break
        if holds(middle):
            high = found = middle
        else:
            low = middle
    return found


def _found(ratio: float | None, name: str, drop: float) -> float:
    if ratio is None:
        rank_zero_warn(
            f"LowRankCompression: no smaller network that was tried has at most {drop:g} less {name}; what no override "
            "is for stays dense. Allow a larger `max_accuracy_drop`, or compress later in the training."
        )
    return 1.0 if ratio is None else ratio


class _Tries:
    """Networks as a cut would make them, measured on copies.

    Args:
        trainer: of the run.
        pl_module: of the run.
        importance: see :meth:`Accuracy.allocate`.
        repair: likewise.
        undo: likewise.
        progress: told of each.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        importance: Mapping[str, Importance] | None,
        repair: Repair,
        undo: ExitStack,
        progress: Progress | None,
    ) -> None:
        self._trainer, self._module, self._importance = trainer, pl_module, importance
        self._repair, self._undo, self._progress, self._done = repair, undo, progress, 0

    def measure(self, allocation: Allocation | None) -> dict[str, float]:
        """Return what the validation logs after a cut; None: of the network as it is."""
        if self._progress is not None:
            self._progress(self._done, 2 + HALVINGS, "")
        self._done += 1
        with quiet(), warnings.catch_warnings(), isolated_rng():
            warnings.simplefilter("ignore")  # the cut itself warns, and so do the validations of the run
            made = self._copy() if allocation is None else self._cut_copy(allocation)
            with self._taking_back() as undo:
                called = _watch(self._module, undo)
                with live():  # the run stands as it was: it can be ended, and saved
                    logged = validate(self._trainer, made)
        _check_unused(called)
        return logged

    def _cut_copy(self, allocation: Allocation) -> LightningModule:
        targets = check_allocation(self._module, allocation)
        with workers() as crew:
            made = build_layers(targets, allocation, crew, processes_of(self._trainer), self._importance)
        with self._taking_back() as undo:
            self._repair(undo, targets, made)
            with standing_in(self._module, {targets[name]: layer for name, layer in made.items()}):
                return self._copy()

    def _taking_back(self) -> ExitStack:
        """Return a stack that the one of the whole closes, too: the end of a block can be interrupted."""
        own = ExitStack()
        self._undo.callback(own.close)
        return own

    def _copy(self) -> LightningModule:
        return copied_module(self._module, "`max_accuracy_drop` tries copies", INSTEAD)


def _watch(pl_module: LightningModule, undo: ExitStack) -> list[str]:
    """Return the names of a module's layers that are called from now on, until the watch is taken back."""
    called: list[str] = []
    for name, layer in find_layers(pl_module).layers.items():
        hooks = layer._forward_pre_hooks
        place = RemovableHandle(hooks).id
        undo.callback(hooks.pop, place, None)  # before there is a hook: an interrupt could come in between
        hooks[place] = lambda *_, name=name: called.append(name)
    return called


def _check_unused(called: Sequence[str]) -> None:
    """Refuse a copy that runs the weights of the module that it was copied from: every try would seem to be that.

    Raises:
        MisconfigurationException: If a layer of the module was called.
    """
    if called:
        raise MisconfigurationException(
            "LowRankCompression: `max_accuracy_drop` validates copies of the module, and a copy ran a layer of the "
            f"module itself ({called[0]}). It may hold functions or modules of the network in a list, a closure or a "
            f"patched `forward`: hold them as attributes and methods, or {INSTEAD}. Nothing was changed."
        )
