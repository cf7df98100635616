"""Repairing: what a run does about a cut before it trains on, on batches of its own training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lr_callback.calibration.collect import collect_moments
from lr_callback.calibration.effects import measure_effects
from lr_callback.calibration.fisher import fisher_importance
from lr_callback.calibration.gains import batchnorm_importance
from lr_callback.common.table import listed, printable, readable, wrap
from lr_callback.common.untouched import putting_back, untouched
from lr_callback.edits.optimizers import optimizers_in
from lr_callback.edits.surgery import standing_in
from lr_callback.host.calibration import WAYS_OUT, calibration_calls, isolated_rng
from lr_callback.host.events import check_flags
from lr_callback.host.scope import Scope
from lr_callback.host.strategies import processes_of
from lr_callback.layers import dense_bias
from lr_callback.mathematics.importance import Importance, checked_importance
from lr_callback.model.following import batchnorm_layers, held_by
from lr_callback.model.probe import Probe
from lr_callback.observation.progress import Told, progress_line
from lr_callback.observation.report import show
from lr_callback.repair.recalibrate import correct_biases_, recalibrate_batchnorm_
from lr_callback.repair.refit import Inputs, refit_

Refit = Literal["auto", "cut", "dense"]


@dataclass(frozen=True)
class Repairing:
    """What is asked of a run's repairs.

    Args:
        refit: factors by least squares, on the inputs of the cut network (``cut``) or of the network before it
            (``dense``); ``auto``: as ``cut`` where the training can be run for it, else not at all, with a warning;
            None: not at all.
        recalibrate_batchnorm: whether statistics of BatchNorm layers are measured anew.
        batches: number of training batches that it takes, on each process.
        correct_biases: whether biases, or the means of BatchNorm layers, make up for what outputs are off on average.
        rebase_batchnorm: whether BatchNorm layers expect the variances of a refitted network.

    Raises:
        ValueError: If an argument is out of range.
    """

    refit: Refit | None = None
    recalibrate_batchnorm: bool = False
    batches: int = 8
    correct_biases: bool = True
    rebase_batchnorm: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.refit not in (None, "auto", "cut", "dense"):
            raise ValueError(f"`refit` must be 'auto', 'cut', 'dense' or None, got {self.refit!r}.")
        check_flags(self, "recalibrate_batchnorm", "correct_biases", "rebase_batchnorm")
        if not isinstance(self.batches, int) or isinstance(self.batches, bool) or self.batches < 1:
            raise ValueError(f"`calibration_batches` must be a whole number of at least 1, got {self.batches!r}.")

    def measure(
        self, trainer: Trainer, pl_module: LightningModule, scope: Scope
    ) -> tuple[Scope, list[Probe], dict[str, Importance] | None]:
        """Return which scope it is, calls on training batches, and the importance of the layers on them.

        No calls, if neither the method nor a repair needs them; or if only what was left open does, and they cannot be
        had: then the scope is that without calibration, and a warning says so.

        Raises:
            MisconfigurationException: If they cannot be had, and something that was asked for needs them.
        """
        needs = scope.chosen is not None and (scope.method.needs_effects or scope.method.error in _MEASURED)
        if needs or self.recalibrate_batchnorm or self.refit in ("cut", "dense"):
            calls = processes_of(trainer).agree(lambda: calibration_calls(trainer, pl_module, self.batches), long=True)
            if scope.chosen is not None:
                return scope, calls, self._importance(trainer, pl_module, scope, calls)
            return self._open(trainer, pl_module, scope, calls, calls)
        if scope.chosen is not None and self.refit is None:
            return scope, [], self._importance(trainer, pl_module, scope, [])
        return self._measure_if_possible(trainer, pl_module, scope)

    def _measure_if_possible(
        self, trainer: Trainer, pl_module: LightningModule, scope: Scope
    ) -> tuple[Scope, list[Probe], dict[str, Importance] | None]:
        """Return what :meth:`measure` does, if every process can; else go without calibration, with a warning."""
        calls: list[Probe] = []

        def attempt() -> str | None:
            try:
                calls.extend(calibration_calls(trainer, pl_module, self.batches))
                with isolated_rng(), untouched(pl_module):
                    next(one for one in calls if one.seen).repeat()
            except Exception as error:
                return _reason(error)
            return None

        reasons = [reason for reason in processes_of(trainer).gather(attempt, long=True) if reason is not None]
        if not reasons and scope.chosen is not None:
            return scope, calls, self._importance(trainer, pl_module, scope, calls)
        if reasons:
            return self._without(trainer, pl_module, scope, [], reasons[0])
        return self._open(trainer, pl_module, scope, calls, [])

    def _open(
        self, trainer: Trainer, pl_module: LightningModule, scope: Scope, calls: list[Probe], left: list[Probe]
    ) -> tuple[Scope, list[Probe], dict[str, Importance] | None]:
        """Return the best scope of a method that was left open, the calls, and the importance on them.

        Where none can be measured it is the scope that needs none, with the calls that are left for repairs.
        """
        reason = ""
        for tried in (scope, scope.without_effects):
            try:
                importance = self._importance(trainer, pl_module, tried, calls, gentle=True)
                checked_importance(tried.method.error, importance, tried.method.needs_effects)
            except Exception as error:
                # Whatever is raised on one process, something is raised on all: none goes on alone.
                reason = _reason(error)
            else:
                return tried, calls, importance
        return self._without(trainer, pl_module, scope, left, reason)

    def _without(
        self, trainer: Trainer, pl_module: LightningModule, scope: Scope, calls: list[Probe], reason: str
    ) -> tuple[Scope, list[Probe], dict[str, Importance] | None]:
        """Return a scope that needs no calibration, with a warning."""
        without = scope.without_calibration
        missing = [] if scope.chosen is not None else ["errors are not weighted by activations"]
        missing += [] if self.refit is None or calls else ["factors are not refitted"]
        rank_zero_warn(_WITHOUT.format(" and ".join(missing), reason))
        return without, calls, self._importance(trainer, pl_module, without, [])

    def _importance(
        self, trainer: Trainer, pl_module: LightningModule, scope: Scope, calls: list[Probe], gentle: bool = False
    ) -> dict[str, Importance] | None:
        return importance_of(trainer, pl_module, scope, calls, gentle, self.correct_biases)

    def repair(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        calls: list[Probe],
        importance: Mapping[str, Importance] | None,
        undo: ExitStack,
        targets: Mapping[str, nn.Module],
        made: Mapping[str, nn.Module],
    ) -> None:
        """Refit layers that are about to be put into a module, and measure BatchNorm statistics as they will be.

        Args:
            trainer: at the start of an epoch.
            pl_module: that still has the layers before the cut.
            calls: from :meth:`measure`.
            importance: from :meth:`measure`.
            undo: given what puts back biases and BatchNorm layers, whose parameters stay the same ones.
            targets: layer name -> the layer that stands there.
            made: layer name -> the layer that takes its place.
        """
        if not calls or not made:
            return
        processes = processes_of(trainer)
        # A layer's bias is that of the layer that stands there, too.
        biases = [bias for layer in made.values() if (bias := dense_bias(layer)) is not None]
        undo.callback(putting_back([*biases, *held_by(batchnorm_layers(pl_module))]))
        replaced = {name: targets[name] for name in made}
        options: dict[str, Any] = {"forward": Probe.repeat, "processes": processes}
        with isolated_rng(), standing_in(pl_module, {targets[name]: layer for name, layer in made.items()}):
            is_refitted = self.refit is not None and self._refit(trainer, pl_module, replaced, calls, options)
            if self.correct_biases and not is_refitted and importance is not None:
                correct_biases_(pl_module, replaced, importance, calls, **options)
            if self.recalibrate_batchnorm:
                with progress_line(trainer, "BatchNorm", "batch") as progress:
                    recalibrate_batchnorm_(pl_module, Told(calls, progress), **options)

    def _refit(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        replaced: Mapping[str, nn.Module],
        calls: list[Probe],
        options: Mapping[str, Any],
    ) -> bool:
        """Refit layers, and return whether that was done: what was left open may fail, with a warning."""
        inputs: Inputs = "dense" if self.refit == "dense" else "cut"
        gentle = self.refit == "auto"
        own: dict[str, Any] = {
            "inputs": inputs,
            "gentle": gentle,
            "biases": self.correct_biases,
            "rebase": self.rebase_batchnorm,
        }
        try:
            with progress_line(trainer, "refit") as progress:
                left = refit_(pl_module, replaced, calls, progress=progress, **own, **options)
        except Exception as error:
            if not gentle:
                raise
            rank_zero_warn(_WITHOUT.format("factors are not refitted", _reason(error)))
            return False
        kept = [name for name in replaced if name not in left]
        if kept and gentle:
            names = listed([printable(readable(name)) for name in kept])
            show(trainer, wrap(_KEPT.format(len(kept), names)))
        return True


def _reason(error: Exception) -> str:
    own = isinstance(error, MisconfigurationException)
    text = str(error).removeprefix("LowRankCompression: ").removesuffix(f" {WAYS_OUT}.")
    return text if own else f"{type(error).__name__}: {error}"


_KEPT = (
    "LowRankCompression: {} layer(s) ({}) keep the factors of their decomposition: the calibration batches show too "
    "little of their inputs to fit them, or none. More `calibration_batches` may help."
)
"""Which layers a refit left as they were."""

_WITHOUT = (
    "LowRankCompression: a cut costs more accuracy than it need, for {}: that takes some training batches, and the "
    "network's calls on them once more in eval mode, which could not be had: {} With method=ALDS() and refit=None this "
    "is not tried, with refit='cut' it is an error."
)
"""Why less than the best is done where nothing was asked for."""


EFFECTS = 2
"""Number of batches that the effects are measured on, at most: each takes as many runs as there are layers."""

_MEASURED = {"activation": collect_moments, "batchnorm": batchnorm_importance}
"""Errors that are weighted by what is seen on some calls -> what sees it."""


@isolated_rng()
def importance_of(
    trainer: Trainer,
    pl_module: LightningModule,
    scope: Scope,
    calls: list[Probe],
    gentle: bool = False,
    biases: bool = True,
) -> dict[str, Importance] | None:
    """Return the importance of the layers on some calls, for a method that weighs errors by it, or layers.

    Args:
        trainer: at the start of an epoch.
        pl_module: that the calls are of.
        scope: its layers and the method.
        calls: of some batches.
        gentle: take what the calls show without warnings that they show little.
        biases: whether constant errors of outputs are made up for; else they count.
    """
    method, known = scope.method, None
    options: dict[str, Any] = {"include": scope.include, "exclude": scope.exclude, "processes": processes_of(trainer)}
    if method.error in _MEASURED:
        with progress_line(trainer, "importance", "batch") as progress:
            own = {"forward": Probe.repeat, **({"gentle": gentle} if method.error == "activation" else {}), **options}
            known = _MEASURED[method.error](pl_module, Told(calls, progress), **own)
    if known is not None and not biases:
        known = {name: replace(one, means=None) for name, one in known.items()}
    if method.error == "fisher":
        optimizers = [*trainer.optimizers, *optimizers_in(pl_module)]
        known = fisher_importance(pl_module, optimizers=optimizers, **options)
    if not method.needs_effects:
        return known
    options |= {"forward": Probe.repeat, "embeddings": scope.embeddings, "gentle": gentle}
    with progress_line(trainer, "effects") as progress:
        return measure_effects(pl_module, calls[:EFFECTS], method, known, progress=progress, **options)
