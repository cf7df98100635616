"""Timed: what a run of a network on its example input takes, right before a compression and right after it."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.common.untouched import as_written, untouched
from lr_callback.host.journal import TIMES
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import run_of_example, why
from lr_callback.units.latency import timed_runs

_RUNS = 5
"""On each process: as many on all, for a network that talks to its copies there."""


class RunTimes:
    """The times of a run in eval mode, in the run's precision, on its device, as written where it is compiled.

    Measured where the module has an ``example_input_array`` that it can be run on.

    Args:
        trainer: of the run.
        pl_module: before a compression.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        self._before: float | None = None
        self._before = self._measure()

    def after(self) -> dict[str, float]:
        """Return both times, in milliseconds, by the names that they are logged by; none where there are none."""
        if self._before is None:
            return {}
        after = self._measure()
        return {} if after is None else dict(zip(TIMES, (self._before, after), strict=True))

    def _measure(self) -> float | None:
        """Return what the first process measures; all of them run."""
        if self._module.example_input_array is None:
            return None
        return processes_of(self._trainer).gather(self._milliseconds)[0]

    def _milliseconds(self) -> float | None:
        with untouched(self._module), as_written():
            try:
                run = run_of_example(self._trainer, self._module)
                return timed_runs(run, self._module.device, _RUNS).nanoseconds / 1e6
            except (ValueError, NotImplementedError) as error:
                if self._before is not None:  # else it was said before the training
                    self._warn(error)
                return None

    def _warn(self, error: Exception) -> None:
        rank_zero_warn(
            "LowRankCompression: what a run takes is not logged: the network ran on its `example_input_array` before "
            f"the compression, and now {why(error)}. The training goes on with the compressed network. Let its forward "
            "take factorized layers, or exclude those that it looks into."
        )
