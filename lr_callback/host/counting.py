"""Counting: what a run's network does and takes, on its example input, or on a batch of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, Unit, check_cost
from lr_callback.host.calibration import calibration_calls
from lr_callback.host.copies import surely_repeats
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import observe_example, why
from lr_callback.model.observe import Observation, Timed
from lr_callback.model.pricing import Prices
from lr_callback.model.probe import Probe
from lr_callback.observation.progress import progress_line
from lr_callback.units.latency import NoisyClockError, Progress, Wanted, check_clock, device_facts

ToTime = Callable[[LightningModule], Mapping[str, Wanted]]
"""From a module to what is to be measured of each of its layers, by name, for a budget in time."""


class Counting:
    """What a run knows of how its network is called.

    Args:
        units: of the budgets; where one of them is observed, a network that cannot be run is an error.

    Attributes:
        units: of the budgets.
        required: whether it is counted on a batch.
        observation: of one batch; None until one was seen.

    Raises:
        ValueError: If there is no such unit.
    """

    def __init__(self, units: tuple[Unit, ...]) -> None:
        for unit in units:
            if isinstance(unit, str):
                check_cost(unit)
        self._kept = ACTIVATION_MEMORY in units
        self._is_timed = LATENCY in units
        self.units, self.required = units, not OBSERVED.isdisjoint(units)
        self._probe: Probe | None = None
        self._possible = True
        self.observation: Observation | None = None

    @property
    def is_due(self) -> bool:
        """Whether budgets wait for a batch."""
        return self.required and self.observation is None

    @property
    def prices(self) -> list[Prices]:
        """What is paid for, in each unit; not before there is an observation, where one takes it."""
        return [Prices(unit, self.observation) for unit in self.units]

    def observe_example(self, trainer: Trainer, pl_module: LightningModule, to_time: ToTime) -> None:
        """Count on the module's example input, where budgets wait for a run.

        Args:
            trainer: of the run.
            pl_module: that is run.
            to_time: says what is to be measured of which layer.

        Raises:
            MisconfigurationException: If the module has none.
            ValueError: If it cannot be run on it.
        """
        if self.is_due:
            with self._progress(trainer) as progress:
                options = (self._timed(pl_module, to_time), progress, self._kept)
                self.observation = _of_the_first(trainer, lambda: observe_example(trainer, pl_module, *options))

    def look_ahead(self, trainer: Trainer, pl_module: LightningModule, to_time: ToTime) -> bool:
        """Count on a training batch before there is a step, where budgets wait for one; return whether that was done.

        It comes from a copy of the loader. Where none can be had, or a stream might lose it, the first batch that is
        trained on is counted on: whatever stands in the way is told of then, if it still does.

        Args:
            trainer: when its loader is there.
            pl_module: whose ``training_step`` is run, as for a calibration.
            to_time: see :meth:`observe_example`.
        """
        loader = trainer.fit_loop._combined_loader
        if not self.is_due or loader is None or not surely_repeats(loader):
            return False
        probes: list[Probe] = []

        def attempt() -> bool:
            try:
                probes.extend(calibration_calls(trainer, pl_module, 1, copies=False))
            except Exception:
                return False
            return True

        if not all(processes_of(trainer).gather(attempt, long=True)):
            return False
        self._probe = probes[0]
        return self.count(trainer, pl_module, to_time)

    def glance(self, trainer: Trainer, pl_module: LightningModule) -> Observation | None:
        """Return what is known of a run; else what the module's example input shows, which decides nothing.

        Args:
            trainer: of the run.
            pl_module: that is run; where it cannot be run on its example input, a warning says why.
        """
        if self.observation is not None or pl_module.example_input_array is None:
            return self.observation
        return _of_the_first(trainer, lambda: _glance(trainer, pl_module))

    def check_known(self, pl_module: LightningModule, to_time: ToTime) -> None:
        """Forget what lacks something that a run before did not need, or measured on another device.

        Args:
            pl_module: that is run.
            to_time: see :meth:`observe_example`.

        Raises:
            ValueError: If times are to be measured, and a file of those of another device stands in their place.
            RuntimeError: If the clock is too noisy to measure any.
        """
        if self._kept and self.observation is not None and self.observation.activations is None:
            self.observation = None  # of a run before, that did not need it
        if not self._is_timed:
            return
        found = None if self.observation is None else self.observation.latencies
        here = found is not None and found.device == device_facts(pl_module.device)
        if found is not None and here and not found.lacks(self._called(to_time(pl_module))):
            return
        check_clock(pl_module.device)
        if self.observation is not None:
            self.observation = None
            what = "all layers that may be factorized now" if here else "this device"
            way_out = "" if here else " Resume on the former device, with as many threads, to have its choice."
            rank_zero_warn(
                f"LowRankCompression: the checkpoint has no times of {what}, they are measured again: what is chosen "
                f"next is the fastest here, and may differ from what the run before would choose.{way_out}"
            )

    def _called(self, wanted: Mapping[str, Wanted]) -> dict[str, Wanted]:
        assert self.observation is not None
        return {name: one for name, one in wanted.items() if self.observation.calls.get(name)}

    def _timed(self, pl_module: LightningModule, to_time: ToTime) -> Mapping[str, Wanted] | None:
        return to_time(pl_module) if self._is_timed else None

    def _progress(self, trainer: Trainer) -> AbstractContextManager[Progress | None]:
        return progress_line(trainer, "latency") if self._is_timed else nullcontext()

    def watch(self, pl_module: LightningModule) -> None:
        """Watch a batch that begins, if none was seen: how the network is called is not known before."""
        if self.observation is None and self._probe is None and self._possible:
            self._probe = Probe(pl_module)
            self._probe.start()

    def count(self, trainer: Trainer, pl_module: LightningModule, to_time: ToTime) -> bool:
        """Count on the batch that was watched, which has ended; return whether there was one.

        Args:
            trainer: of the run.
            pl_module: whose calls were watched.
            to_time: see :meth:`observe_example`.
        """
        probe, self._probe = self._probe, None
        if probe is None:
            return False
        probe.stop()
        with self._progress(trainer) as progress:
            timed_for = self._timed(pl_module, to_time)
            self.observation = _of_the_first(trainer, lambda: self._observe(probe, timed_for, progress))
        self._possible = self.observation is not None
        return True

    def _observe(self, probe: Probe, timed_for: Timed | None, progress: Progress | None) -> Observation | None:
        """Count the calls again; a model that cannot be run again does without, where it can."""
        try:
            return probe.observe(timed_for, progress, self._kept)
        except Exception as error:
            if self.required:
                raise
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
            rank_zero_warn(
                "LowRankCompression: multiply-adds are not reported, the network's calls of the first batch could not "
                f"be repeated in eval mode ({type(error).__name__}: {error}). The compression is not affected. To have "
                "them counted, let the network be called in eval mode with what it is trained on."
            )
            return None

    def stop(self) -> None:
        """Watch no longer."""
        if self._probe is not None:
            self._probe.stop()
            self._probe = None


def _glance(trainer: Trainer, pl_module: LightningModule) -> Observation | None:
    try:
        return observe_example(trainer, pl_module)
    except (ValueError, NotImplementedError) as error:  # the latter of an example on the meta device
        rank_zero_warn(
            "LowRankCompression: how many multiply-adds can be kept is not said before the training: the network must "
            f"run on its `example_input_array`, and {why(error)}. The compression is not affected. Give what its "
            "forward takes, or none."
        )
        return None


def _of_the_first(trainer: Trainer, observe: Callable[[], Observation | None]) -> Observation | None:
    """Return the first process's observation: batches of others may be of other sizes, and a budget is one for all.

    All of them observe: a network that talks to its copies on other processes must not do so alone. How well the
    others could measure times is no matter.
    """
    processes = processes_of(trainer)

    def own() -> Observation | None:
        try:
            return observe()
        except NoisyClockError:
            if processes.rank == 0:
                raise
            return None

    return processes.gather(own)[0]
