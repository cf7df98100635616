"""Callback: the host side, inside ``Trainer.fit``. It decides when; everything else is done by the floors below."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lr_callback.common.interrupts import held
from lr_callback.decisions.goals import Goal, one_goal, units_of
from lr_callback.decisions.methods import Method
from lr_callback.edits.projection import OptimizerState, check_optimizer_state
from lr_callback.edits.surgery import SurgeryReport, keep_places
from lr_callback.files.hook import hold_structure, install_hook, release_structure
from lr_callback.host.accuracy import Accuracy
from lr_callback.host.averaging import align_averages, held_averages
from lr_callback.host.checkpointed import Checkpointed
from lr_callback.host.cut import cut, start_of
from lr_callback.host.events import check_flags
from lr_callback.host.feasibility import check_goals
from lr_callback.host.journal import log_multiply_adds, tell
from lr_callback.host.monitors import warn_of_no_best
from lr_callback.host.neighbours import check_alone, check_neighbours
from lr_callback.host.repairing import Refit, Repairing
from lr_callback.host.resume import Resuming
from lr_callback.host.schedule import Schedule, When
from lr_callback.host.scope import Scope
from lr_callback.host.snapshots import publish, write_part
from lr_callback.host.strategies import check_same_weights, check_strategy, processes_of, same_on_all
from lr_callback.host.timed import RunTimes
from lr_callback.host.trainer import check_optimizers, is_smoke_test, lacks
from lr_callback.model.find import factorized_in
from lr_callback.observation.gallery import Gallery
from lr_callback.units.own_cost import read_cost


class LowRankCompression(Checkpointed):
    """Factorize a network's layers in place at chosen epochs of ``Trainer.fit``, and train on.

    At the start of each chosen epoch one budget is allocated over all layers, and each chosen one is replaced by two
    smaller ones. Optimizers and schedulers go on; checkpoints from before and after can be resumed, tested and
    restored. A Trainer takes one of these callbacks; for several compressions give it lists.

    Args:
        keep_ratio: fraction of all parameters (or of ``cost``) to keep, in (0, 1]; or one for each epoch in ``epochs``.
            None: 0.5, unless one of the next three is given.
        budget: in its place, fractions in several units at once, ``{"parameters": 0.3, "multiply_adds": 0.6}``; all
            hold, and the allocation tells how far from the best it may be.
        max_error: in its place, the largest relative error that a layer may have, in (0, 1], in the method's measure:
            the model becomes as small as that lets it.
        max_accuracy_drop: in its place, by how much the accuracy that the run's validation measures may be lower right
            after a cut, in its own unit. At most nine validations find the smallest model tried that holds it.
        monitor: name of that metric, of which more is better; None: the one logged in validation with ``acc`` in it.
        epochs: at the start of which epoch, counted from 0; or several, ascending. Each later one multiplies the
            factors back and allocates anew.
        when: ``epochs``; or ``auto``: once, when the spectra of the layers have settled, the median stable rank being
            within 2 % of what it was in each of the last two epochs, at the latest at half of ``max_epochs``.
        ramp: reach ``keep_ratio`` step by step over several ``epochs``, see :func:`lr_callback.host.events.cubic_ramp`.
        method: how to choose ranks; None: ``ALDS("activation", "loss", power=4, shrinkage=0.5)``, which weighs errors
            by what comes into the layers and what they do to the outputs; where that cannot be measured ``ALDS()``,
            with a warning.
        cost: ``parameters``, ``bytes`` of the state dict's tensors, ``multiply_adds`` or ``latency`` of a run on the
            module's ``example_input_array``, without one on a training batch; or your own: a function, or the
            path to import one by, that says what any module costs (:mod:`lr_callback.units.own_cost`).
        include: patterns of layers; only these are factorized. By default all. A glob pattern of names (``layer1.*``),
            a type (``type:Linear``), ``place:first`` or ``place:last`` (:mod:`lr_callback.model.patterns`).
        exclude: patterns of layers that stay dense.
        embeddings: whether ``nn.Embedding`` is factorized, too.
        overrides: pattern of layers -> what each becomes, whatever the others do: ``{"keep_ratio": 0.5}`` of itself,
            ``{"rank": 32}`` (and ``num_slices``, ``folding``) or ``"dense"`` (:mod:`lr_callback.model.overrides`).
        optimizer_state: what the optimizer knows of new factors: ``reset``, nothing; or ``project``, the momentum of
            their dense weight through the chain rule, for SGD, Adam and AdamW (:mod:`lr_callback.edits.projection`).
        learning_rate_rewind: after each compression let learning rates and schedulers start again as the run began.
        refit: refit the factors at each compression by least squares (:mod:`lr_callback.repair.refit`), layer after
            layer on the inputs that the compressed network gives them (``cut``), or at once on those of the network
            before it (``dense``); ``auto``: as ``cut`` where the training can be run for it, else a warning; None: not
            at all.
        correct_biases: let a layer's bias, or the mean of the BatchNorm that takes its outputs, make up for what these
            are off on average, in a refit or without one (:func:`lr_callback.correct_biases_`); if
            not, such an error counts as any other.
        rebase_batchnorm: after a refit let trained BatchNorm layers expect the variances of the refitted network
            (:mod:`lr_callback.repair.rebasing`): otherwise a network that is right in eval mode begins to train as
            another.
        recalibrate_batchnorm: measure the statistics of BatchNorm layers anew at each compression.
        calibration_batches: number of training batches, on each process, that these take, an error that is weighted by
            activations, and the objective ``loss``: from a copy of the training loader, with its augmentation.
        distill: from the first compression on let the loss be ``(1 - distill)`` times what ``training_step`` returns
            plus ``distill`` times the distance of the network's scores from those of a frozen copy of the network
            before (:func:`lr_callback.distillation_loss`); None: not at all. Takes the memory of all dense weights, on
            the device and in each checkpoint, and that of a forward pass without gradients.
        distill_temperature: of both softmaxes.
        figures: whether loggers get figures, table and arguments (:mod:`lr_callback.observation.gallery`; matplotlib).
        show_table: print what can be kept at least before the training, and the table at each compression.
        snapshots: write weights-only checkpoints ``dense.ckpt`` (before the first compression), ``cut.ckpt`` (after the
            latest) and ``final.ckpt`` into ``compression`` in the log folder, or else in ``default_root_dir``.
        reset_monitors: let EarlyStopping and ModelCheckpoint begin anew at each compression: what was best so far was
            of another model; files stay.

    Raises:
        TypeError: If ``method`` is no method, or a switch neither True nor False.
        ValueError: If an argument is out of range.
        MisconfigurationException: If the Trainer's strategy, precision plugin or another callback is not supported.

    Example::

        >>> LowRankCompression(keep_ratio=[0.5, 0.3], epochs=[10, 20]).events
        {10: 0.5, 20: 0.3}
    """

    def __init__(
        self,
        keep_ratio: float | list[float] | None = None,
        epochs: int | list[int] = 1,
        *,
        budget: dict[str, float] | None = None,
        max_error: float | None = None,
        max_accuracy_drop: float | None = None,
        monitor: str | None = None,
        when: When = "epochs",
        ramp: bool = False,
        method: Method | None = None,
        cost: str | Callable[[nn.Module], float] = "parameters",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        embeddings: bool = False,
        overrides: dict[str, Any] | None = None,
        optimizer_state: OptimizerState = "reset",
        learning_rate_rewind: bool = False,
        refit: Refit | None = "auto",
        correct_biases: bool = True,
        rebase_batchnorm: bool = True,
        recalibrate_batchnorm: bool = False,
        calibration_batches: int = 8,
        distill: float | None = None,
        distill_temperature: float = 4.0,
        figures: bool = True,
        show_table: bool = True,
        snapshots: bool = False,
        reset_monitors: bool = True,
    ) -> None:
        cost = read_cost(cost)
        self._gallery = Gallery(figures, locals())
        goal = one_goal(keep_ratio, budget, max_error, cost, max_accuracy_drop)
        super().__init__(units_of(goal, cost), monitor, distill, distill_temperature, learning_rate_rewind)
        check_optimizer_state(optimizer_state)
        self.schedule = Schedule(goal, epochs, ramp, when)
        self.repairing = Repairing(refit, recalibrate_batchnorm, calibration_batches, correct_biases, rebase_batchnorm)
        self.scope = Scope(method, include, exclude, embeddings, overrides)
        self.optimizer_state = optimizer_state
        self.show_table, self.snapshots, self.reset_monitors = show_table, snapshots, reset_monitors
        check_flags(self._gallery, "figures")
        check_flags(self, "learning_rate_rewind", "show_table", "snapshots", "reset_monitors")
        self._accuracy = Accuracy(monitor, show_table)

    @property
    def events(self) -> dict[int, Goal]:
        """Epoch -> fraction to keep, or another goal; with ``when="auto"`` the latest epoch at which it may be."""
        return self.schedule.events

    def should_compress(self, trainer: Trainer, pl_module: LightningModule) -> Goal | None:
        """Return the fraction to keep if the model is to be compressed at the start of this epoch, else None.

        Or another goal (:mod:`lr_callback.decisions.goals`), in the units of the callback's own. Override it for other
        moments. By default the latest event that is due; under ``fast_dev_run`` the first.
        """
        return self.schedule.due(trainer, self._record)

    def averages(self, trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
        """Return the averages of the module's weights, which are compressed along with it, in its basis.

        By default every ``AveragedModel`` that a callback holds, and the copy of StochasticWeightAveraging. Override it
        to add a copy of your own; it is asked in ``setup``, too.
        """
        return held_averages(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the module take the structure of any checkpoint."""
        fits = stage == "fit"
        if fits:
            check_strategy(trainer, pl_module)
            check_alone(trainer, LowRankCompression)
            check_neighbours(trainer, pl_module)
            self.schedule.begin(trainer)
            self._accuracy.check(trainer, self.events.values())
        for module in (pl_module, *self.averages(trainer, pl_module)):
            install_hook(module)
        release_structure(pl_module)
        self._resuming = Resuming(expected=fits)
        if fits and trainer.current_epoch == 0:
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizers' parameters in the order of the file; check optimizers, schedules and budgets."""
        if self.allocation is not None and lacks(trainer, pl_module, self.allocation):
            self._forget()
        self._resuming.check(trainer)
        self._resuming.order_optimizers(trainer, pl_module)
        check_optimizers(trainer, self.optimizer_state)
        self._distilling.check(pl_module)
        self.scope.check_optimizers(trainer, pl_module)
        align_averages(pl_module, self.averages(trainer, pl_module))
        if self.learning_rate_rewind:
            self._record = replace(self._record, start=start_of(trainer, self._record.start))
        self._counting.check_known(pl_module, self.scope.to_time)
        if pl_module.example_input_array is not None:
            self._counting.observe_example(trainer, pl_module, self.scope.to_time)
        self._check_goals(trainer, pl_module)

    def _check_goals(self, trainer: Trainer, pl_module: LightningModule) -> None:
        goals = self.schedule.left(self._record)
        check_goals(trainer, pl_module, self.scope, self._counting, goals, self.show_table)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse from now on a state dict of another structure, and begin an epoch that is to begin; check budgets."""
        hold_structure(pl_module)
        self._distilling.begin(trainer, pl_module, self.allocation is not None)
        self._resuming.begin(trainer)
        if self._counting.look_ahead(trainer, pl_module, self.scope.to_time):
            self._check_goals(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module take any structure again."""
        release_structure(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress, if it is time."""
        self._record = self.schedule.measure(trainer, pl_module, self.scope, self._record)
        goal = same_on_all(trainer, lambda: self.should_compress(trainer, pl_module))
        if goal is not None:
            self.compress(trainer, pl_module, goal)

    def compress(self, trainer: Trainer, pl_module: LightningModule, keep_ratio: Goal) -> SurgeryReport:
        """Analyse, allocate, replace the layers and let the optimizers follow; write snapshots, log and print.

        It is done as a whole or not at all: whatever is raised on the way leaves all as it was.

        Args:
            trainer: whose optimizers are edited.
            pl_module: whose layers are replaced.
            keep_ratio: in (0, 1], or another goal (:mod:`lr_callback.decisions.goals`).

        Raises:
            ValueError: If the budget cannot be met or a weight is not finite.
            MisconfigurationException: If multiply-adds are to be counted and no input is known.
        """
        processes = processes_of(trainer)
        with held(), ExitStack() as undo:
            for noted in map(vars, (self, self._counting, self._distilling, self._logged)):
                undo.callback(noted.update, dict(noted))
            keep_places(pl_module, undo)
            if not factorized_in(pl_module):
                self._snapshot(trainer, "dense", again=False)
            self._counting.observe_example(trainer, pl_module, self.scope.to_time)
            started = perf_counter()
            scope, calls, importance = self.repairing.measure(trainer, pl_module, self.scope)
            times = RunTimes(trainer, pl_module, calls)
            analysis = scope.analyze(trainer, pl_module, self._counting.prices, importance)
            check_same_weights(trainer, pl_module)
            repair = partial(self.repairing.repair, trainer, pl_module, calls, importance)
            allocation = self._accuracy.allocate(trainer, pl_module, analysis, keep_ratio, importance, repair, undo)
            curves = processes.first(lambda: analysis.curves(allocation))
            averages = processes.agree(lambda: self.averages(trainer, pl_module))
            self._distilling.keep(trainer, pl_module)
            options = (averages, self.reset_monitors, self.optimizer_state, self._record.start, importance)
            report = cut(trainer, pl_module, allocation, undo, *options, partial(repair, undo))
            seconds = processes.first(lambda: perf_counter() - started - times.seconds)
            part = write_part(trainer, "cut", undo) if self.snapshots else None
            told = (allocation, self._counting.observation, seconds, self.show_table, curves, self._gallery)
            known = {**self._logged.before(trainer, self._accuracy.measured), **times.after()}
            processes.agree(lambda: tell(trainer, pl_module, *told, known, times.sentence))
            self._record = self._record.after(allocation, self.schedule.passed(trainer), curves)
            undo.pop_all()
            self._record = self._record.with_files(publish(trainer, part))
        return report

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Count the multiply-adds of the first batch, where it was not done before; log the distillation."""
        self._distilling.log(pl_module)
        if not self._counting.count(trainer, pl_module, self.scope.to_time):
            return
        if self._counting.required:
            self._check_goals(trainer, pl_module)
        if self.allocation is not None:
            log_multiply_adds(trainer, pl_module, self._counting.observation)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last snapshot; warn if a compression did not come, or no file is of the compressed model."""
        self._distilling.end()
        self.schedule.end(trainer, self._record)
        if self.allocation is not None:
            self._snapshot(trainer, "final")
            if self.reset_monitors and not is_smoke_test(trainer):
                warn_of_no_best(trainer)
