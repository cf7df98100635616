"""Counting: what a run's network does and takes, on its example input or on the first batch that it trains on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, Unit, check_cost
from lr_callback.decisions.methods import Method, best_method
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import observe_example
from lr_callback.model.observe import Observation
from lr_callback.model.pricing import Prices
from lr_callback.model.probe import Probe
from lr_callback.observation.progress import progress_line
from lr_callback.units.latency import Progress, check_clock, device_facts


class Counting:
    """What a run knows of how its network is called.

    Args:
        units: of the budgets; where one of them is observed, a network that cannot be run is an error.
        method: by which ranks are chosen; None: the one for a training that can be run for it.

    Attributes:
        units: of the budgets.
        required: whether it is counted on a batch.
        observation: of one batch; None until one was seen.

    Raises:
        ValueError: If there is no such unit.
    """

    def __init__(self, units: tuple[Unit, ...], method: Method | None = None) -> None:
        for unit in units:
            if isinstance(unit, str):
                check_cost(unit)
        self._kept = ACTIVATION_MEMORY in units
        self._timed_for = (method or best_method()) if LATENCY in units else None
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

    def observe_example(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on the module's example input, where a budget in multiply-adds is due before any batch was seen.

        Raises:
            MisconfigurationException: If the module has none.
        """
        if self.is_due:
            with self._progress(trainer) as progress:
                options = (self._timed_for, progress, self._kept)
                self.observation = _of_the_first(trainer, lambda: observe_example(trainer, pl_module, *options))

    def check_device(self, pl_module: LightningModule) -> None:
        """Forget what a run before did not need, or measured on another device, or with other threads.

        Raises:
            ValueError: If times are to be measured, and a file of those of another device stands in their place.
            RuntimeError: If the clock is too noisy to measure any.
        """
        if self._kept and self.observation is not None and self.observation.activations is None:
            self.observation = None  # of a run before, that did not need it
        if self._timed_for is None:
            return
        found = None if self.observation is None else self.observation.latencies
        if found is not None and found.device == device_facts(pl_module.device):
            return
        check_clock(pl_module.device)
        if self.observation is not None:
            self.observation = None
            rank_zero_warn(
                "LowRankCompression: the checkpoint has no times of this device, they are measured again: what is "
                "chosen next is the fastest here, and may differ from what a run on the former device would choose. "
                "Resume on that one, with as many threads, to have its choice."
            )

    def _progress(self, trainer: Trainer) -> AbstractContextManager[Progress | None]:
        return nullcontext() if self._timed_for is None else progress_line(trainer, "latency")

    def watch(self, pl_module: LightningModule) -> None:
        """Watch a batch that begins, if none was seen: how the network is called is not known before."""
        if self.observation is None and self._probe is None and self._possible:
            self._probe = Probe(pl_module)
            self._probe.start()

    def count(self, trainer: Trainer) -> bool:
        """Count on the batch that was watched, which has ended; return whether there was one."""
        probe, self._probe = self._probe, None
        if probe is None:
            return False
        probe.stop()
        with self._progress(trainer) as progress:
            self.observation = _of_the_first(trainer, lambda: self._observe(probe, progress))
        self._possible = self.observation is not None
        return True

    def _observe(self, probe: Probe, progress: Progress | None) -> Observation | None:
        """Count the calls again; a model that cannot be run again does without, where it can."""
        try:
            return probe.observe(self._timed_for, progress, self._kept)
        except Exception as error:
            if self.required:
                raise
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


def _of_the_first(trainer: Trainer, observe: Callable[[], Observation | None]) -> Observation | None:
    """Return the first process's observation: batches of others may be of other sizes, and a budget is one for all.

    All of them observe: a network that talks to its copies on other processes must not do so alone.
    """
    return processes_of(trainer).gather(observe)[0]
