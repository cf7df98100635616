"""Callback: the host side, inside ``Trainer.fit``. It decides when; everything else is done by the floors below."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.allocation import Allocation
from lr_callback.analysis import Analysis, analyze, check_method, survey
from lr_callback.checkpoint import hold_structure, install_hook, release_structure
from lr_callback.costs import check_cost
from lr_callback.cut import cut
from lr_callback.events import read_events
from lr_callback.host import check_strategy, is_smoke_test, observe_example
from lr_callback.journal import log_compression, log_multiply_adds
from lr_callback.methods import Method
from lr_callback.observe import Observation
from lr_callback.optimizers import names_of, rebind
from lr_callback.probe import Probe
from lr_callback.report import analysis_progress, show
from lr_callback.resume import begin_epoch, turn_epoch
from lr_callback.snapshots import publish, write_part, write_snapshot
from lr_callback.surgery import SurgeryReport

_GROUPS = "lr_callback_optimizer_names"


class LowRankCompression(Callback):
    """Factorize a network's layers in place at chosen epochs of ``Trainer.fit``, and train on.

    At the start of each chosen epoch the errors of all layers are computed, one budget is allocated over them, and each
    chosen layer is replaced by two smaller ones. Optimizers and schedulers go on as they are; checkpoints can be
    resumed, tested and restored whether they are from before or after. A Trainer takes one of these callbacks; for
    several compressions give it lists.

    Args:
        keep_ratio: fraction of all parameters (or of ``cost``) to keep, in (0, 1]; or one for each epoch in ``epochs``.
        epochs: at the start of which epoch, counted from 0; or several, ascending. Each later one multiplies the
            factors back and allocates anew.
        method: how to choose ranks; by default ``ALDS()``.
        cost: ``parameters``, or ``multiply_adds`` as counted on the first training batch (for epoch 0 on the module's
            ``example_input_array``).
        include: glob patterns of layer names; only these are factorized. By default all.
        exclude: glob patterns of layer names that stay dense.
        show_table: print the table of all layers at each compression.
        snapshots: write weights-only checkpoints ``dense.ckpt`` (before the first compression), ``cut.ckpt`` (right
            after the latest) and ``final.ckpt`` into the folder ``compression`` of the log folder; without a logger of
            ``default_root_dir``. Under ``fast_dev_run`` they are gone with the Trainer.

    Raises:
        TypeError: If ``method`` is no method.
        ValueError: If an argument is out of range.
        MisconfigurationException: If the Trainer's strategy is not supported.

    Example::

        >>> LowRankCompression(keep_ratio=[0.5, 0.3], epochs=[10, 20]).events
        {10: 0.5, 20: 0.3}
    """

    def __init__(
        self,
        keep_ratio: float | list[float] = 0.5,
        epochs: int | list[int] = 1,
        *,
        method: Method | None = None,
        cost: str = "parameters",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        show_table: bool = True,
        snapshots: bool = False,
    ) -> None:
        super().__init__()
        check_cost(cost)
        self.events = read_events(keep_ratio, epochs)
        self.method = check_method(method)
        self.cost, self.include, self.exclude = cost, include, exclude
        self.show_table, self.snapshots = show_table, snapshots
        self.allocation: Allocation | None = None
        self.snapshot_files: dict[str, str] = {}
        self._applied: list[int] = []
        self._observation: Observation | None = None
        self._probe: Probe | None = None
        self._countable = True
        self._saved_names: list[list[list[str | None]]] | None = None
        self._turns = False

    def should_compress(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Return the fraction to keep if the model is to be compressed at the start of this epoch, else None.

        Override it to compress at other moments. By default: the latest event that is due and was not applied, also
        where its own epoch was passed in a run without this callback; under ``fast_dev_run`` the first, at once.
        """
        if is_smoke_test(trainer) and not self._applied:
            return self.events[min(self.events)]
        last = max(self._applied, default=-1)
        due = [event for event in self.events if last < event <= trainer.current_epoch]
        return self.events[max(due)] if due else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the module take the structure of any checkpoint."""
        install_hook(pl_module)
        release_structure(pl_module)
        # Of a file that was read for a test, perhaps; a file to resume from comes later.
        self._saved_names, self._turns = None, False
        if stage != "fit":
            return
        check_strategy(trainer)
        if trainer.current_epoch == 0:
            self._forget()
        limit = trainer.max_epochs
        late = [epoch for epoch in self.events if limit is not None and 0 <= limit <= epoch]
        if late and not is_smoke_test(trainer):
            rank_zero_warn(
                f"LowRankCompression: epochs {late} are never reached, max_epochs is {limit} and epochs count from 0."
            )

    def _forget(self) -> None:
        """Begin anew: an earlier run of this callback may have been with another model or other batches."""
        self.allocation, self._observation, self._probe = None, None, None
        self._applied, self.snapshot_files, self._countable = [], {}, True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizers' parameters in the order of the file, and check that the budgets can be met."""
        if self._saved_names is not None:
            rebind(trainer.optimizers, self._saved_names, dict(pl_module.named_parameters()))
            self._saved_names = None
        if self._observation is None and (0 in self.events or is_smoke_test(trainer)):
            self._observe_example(trainer, pl_module)
        if self.cost == "parameters" or self._observation is not None:
            self._check_budgets(pl_module)

    def _observe_example(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on the module's example input, where a budget in multiply-adds is due before any batch was seen."""
        if self.cost == "multiply_adds":
            self._observation = observe_example(trainer, pl_module)

    @property
    def _counted_on(self) -> Observation | None:
        """What costs are counted on: None for parameters, and for multiply-adds while no input was seen."""
        return self._observation if self.cost == "multiply_adds" else None

    def _check_budgets(self, pl_module: LightningModule) -> None:
        """Refuse budgets that cannot be met before the training, not in the middle of it."""
        counted, include, exclude = self._counted_on, self.include, self.exclude
        prices = survey(pl_module, self.method, observation=counted, include=include, exclude=exclude)
        for keep_ratio in self.events.values():
            prices.allocate(keep_ratio)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse from now on a state dict of another structure, and begin an epoch that is to begin."""
        hold_structure(pl_module)
        if self._turns:
            begin_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module take any structure again."""
        release_structure(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress, if it is time."""
        keep_ratio = self.should_compress(trainer, pl_module)
        if keep_ratio is not None:
            self.compress(trainer, pl_module, keep_ratio)

    def compress(self, trainer: Trainer, pl_module: LightningModule, keep_ratio: float) -> SurgeryReport:
        """Analyse, allocate, replace the layers and let the optimizers follow; write snapshots, log and print.

        It is done as a whole or not at all: whatever is raised on the way, also by a logger, a full disk or a person's
        interrupt, leaves the model, the optimizers and this callback as they were.

        Args:
            trainer: whose optimizers are edited.
            pl_module: whose layers are replaced.
            keep_ratio: fraction to keep, in (0, 1].

        Raises:
            ValueError: If the budget cannot be met or a weight is not finite. Nothing was changed.
            MisconfigurationException: If multiply-adds are to be counted and no input is known. Nothing was changed.
        """
        started = perf_counter()
        with ExitStack() as undo:
            undo.callback(vars(self).update, dict(vars(self)))
            if "dense" not in self.snapshot_files:
                self._snapshot(trainer, "dense")
            allocation = self._analyze(trainer, pl_module).allocate(keep_ratio)
            self._note(trainer, allocation)
            report = cut(trainer, pl_module, allocation, undo)
            seconds = perf_counter() - started
            part = write_part(trainer, "cut", undo) if self.snapshots else None
            log_compression(trainer, pl_module, allocation, self._observation, seconds)
            if self.show_table:
                show(trainer, f"Low-rank compression at the start of epoch {trainer.current_epoch}\n{allocation}")
            undo.pop_all()
        self.snapshot_files = self.snapshot_files | publish(trainer, part)
        return report

    def _note(self, trainer: Trainer, allocation: Allocation) -> None:
        """Note what is done now, and that the events until now have passed."""
        self.allocation = allocation
        passed = min(self.events) if is_smoke_test(trainer) else trainer.current_epoch
        self._applied = sorted({*self._applied, *(event for event in self.events if event <= passed)})

    def _analyze(self, trainer: Trainer, pl_module: LightningModule) -> Analysis:
        if self._observation is None:
            self._observe_example(trainer, pl_module)
        with analysis_progress(trainer.progress_bar_callback) as progress:
            return analyze(
                pl_module,
                self.method,
                observation=self._counted_on,
                include=self.include,
                exclude=self.exclude,
                progress=progress,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Watch the first batch: how the network is called is not known before."""
        if self._observation is None and self._probe is None and self._countable:
            self._probe = Probe(pl_module)
            self._probe.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count the multiply-adds of the first batch."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        probe.stop()
        self._observation = self._count(probe)
        if self.cost == "multiply_adds":
            self._check_budgets(pl_module)
        if self.allocation is not None:
            log_multiply_adds(trainer, pl_module, self._observation)

    def _count(self, probe: Probe) -> Observation | None:
        """Count the multiply-adds of the probed calls; a model that cannot be run again does without, where it can."""
        try:
            return probe.observe()
        except Exception as error:
            if self.cost == "multiply_adds":
                raise
            self._countable = False
            rank_zero_warn(
                "LowRankCompression: multiply-adds are not reported, the network's calls of the first batch could not "
                f"be repeated in eval mode ({type(error).__name__}: {error}). The compression is not affected."
            )
            return None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks of ours behind."""
        release_structure(pl_module)
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last snapshot."""
        if self.allocation is not None:
            self._snapshot(trainer, "final")

    def _snapshot(self, trainer: Trainer, name: str) -> None:
        if self.snapshots:
            self.snapshot_files = self.snapshot_files | write_snapshot(trainer, name)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        return {
            "version": 1,
            "applied": list(self._applied),
            "allocation": None if self.allocation is None else self.allocation.to_dict(),
            "observation": None if self._observation is None else self._observation.to_dict(),
            "snapshot_files": dict(self.snapshot_files),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` wrote."""
        allocation, observation = state_dict["allocation"], state_dict["observation"]
        self._applied = list(state_dict["applied"])
        self.allocation = None if allocation is None else Allocation.from_dict(allocation)
        self._observation = None if observation is None else Observation.from_dict(observation)
        written: dict[str, str] = state_dict["snapshot_files"]
        self.snapshot_files = {name: path for name, path in written.items() if Path(path).is_file()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the names of the parameters in each optimizer's groups."""
        checkpoint[_GROUPS] = names_of(trainer.optimizers, dict(pl_module.named_parameters()))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the names of the parameters in each optimizer's groups, and whether an epoch is to begin."""
        self._turns |= turn_epoch(checkpoint)
        self._saved_names = checkpoint.get(_GROUPS)
