"""Timed: what a run of a network takes, right before a compression and right after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.common.table import wrap
from lr_callback.common.untouched import as_written, untouched
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import run_of_example, why
from lr_callback.model.probe import Probe
from lr_callback.model.running import told
from lr_callback.units.latency import folder, timed_runs

_RUNS = 5
"""On each process: as many on all, for a network that talks to its copies there."""

_FAR = 1.5
"""Times that a prediction may be off by, until it is said what may be the reason."""

_TOO_LITTLE = (
    "That is far off: either the machine was busy, now or when the layers were measured, or memory that is freed is "
    "not kept (docs/SPEED.md), or the times in {} are not of these layers. Measure again without these files while "
    "nothing else runs."
)

Made = Callable[[], Callable[[], object]]
"""Makes a run, or says why there is none."""


class RunTimes:
    """The times of a run in eval mode, in the run's precision, on its device, as written where it is compiled.

    It is on the module's ``example_input_array``; where there is none, or the module cannot be run on it, on the first
    of the batches that the compression is calibrated with; where there are none either, nothing is timed.

    Args:
        trainer: of the run.
        pl_module: before a compression.
        calls: of the network on batches, if it is calibrated.

    Attributes:
        seconds: that the timing has taken so far.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, calls: Sequence[Probe]) -> None:
        self._trainer, self._module, self.seconds = trainer, pl_module, 0.0
        self._before: float | None = None
        self._after: float | None = None
        said = ""
        for self._what, self._made in _runs(trainer, pl_module, calls):
            self._before, said = self._measure(interruptible=True)
            if self._before is not None:
                return
        if said:
            way_out = "The compression is not affected. Let it run on that in eval mode."
            _warn(f"the network must run on {self._what}, and {said}. {way_out}")

    def after(self) -> dict[str, float]:
        """Return both times, in milliseconds, by the names that they are logged by; none where there are none."""
        if self._before is None:
            return {}
        # Signals wait: a handler that saves a checkpoint would find layers that the record does not know yet.
        self._after, said = self._measure(interruptible=False)
        if self._after is None:
            _warn(
                f"the network ran on {self._what} before the compression, and now {said}. The training goes on with "
                "the compressed network. Let its forward take factorized layers, or exclude those that it looks into."
            )
            return {}
        return {"milliseconds_before": self._before, "milliseconds_after": self._after}

    def sentence(self, predicted: float | None = None) -> str:
        """Return what a person is told; empty where there are no times.

        Args:
            predicted: milliseconds that measured times of layers say, where time is a budget.
        """
        if self._before is None or self._after is None:
            return ""
        text = f"A run on {self._what} takes {self._after:,.2f} ms, and took {self._before:,.2f} ms before"
        if predicted is None:
            return wrap(f"{text}.")
        text = f"{text}; {predicted:,.2f} ms were predicted."
        return wrap(text if self._after <= _FAR * predicted else f"{text} {_TOO_LITTLE.format(folder())}")

    def _measure(self, interruptible: bool) -> tuple[float | None, str]:
        """Return what the first process measures, or why it cannot; all of them run."""
        started = perf_counter()
        found = processes_of(self._trainer).gather(self._milliseconds, long=interruptible)[0]
        self.seconds += perf_counter() - started
        return found

    def _milliseconds(self) -> tuple[float | None, str]:
        with untouched(self._module), as_written():
            try:
                return timed_runs(self._made(), self._module.device, _RUNS).nanoseconds / 1e6, ""
            except (ValueError, NotImplementedError) as error:  # the latter of an example on the meta device
                return None, why(error)


def _runs(trainer: Trainer, pl_module: LightningModule, calls: Sequence[Probe]) -> Iterator[tuple[str, Made]]:
    """Give what the network can be run on, as it is called in a sentence, and what makes the run; the best first."""
    if pl_module.example_input_array is not None:
        yield "the `example_input_array`", lambda: run_of_example(trainer, pl_module)
    if calls:
        yield "a calibration batch", lambda: _repeated(pl_module, next(one for one in calls if one.seen))


def _repeated(pl_module: LightningModule, probe: Probe) -> Callable[[], object]:
    way_out = "let them be made in eval mode"
    return told(pl_module, probe.repeat, "the network's calls of the batch must be possible again", way_out)


def _warn(text: str) -> None:
    rank_zero_warn(f"LowRankCompression: what a run takes is not logged: {text}")
