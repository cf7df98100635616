"""Timing: how long a call takes on a device, and how far repeated calls differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles
from time import perf_counter_ns

import torch

_BLOCK = 200_000  # nanoseconds that are timed at a time: a clock's own call takes less than a thousandth of it
_LEAST_BLOCKS = 5
_MOST_BLOCKS = 200
_FASTEST = 0.5
"""Part of the median below which the fastest run shows that the others were held up, however alike they are."""
_STEADY = 0.05
"""Spread below which no more runs are needed."""


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Args:
        nanoseconds: median over the runs.
        spread: distance between the quartiles of the runs, as a fraction of the median; or that of the fastest run
            from the median, where it took less than half of it.
    """

    nanoseconds: int
    spread: float


def timed(run: Callable[[], object], device: torch.device, seconds: float = 0.1) -> Timing:
    """Measure how long a call takes, the work that it leaves to the device included.

    Args:
        run: the call; it is made some times beforehand.
        device: that it works on.
        seconds: how long to measure at most, where runs differ; five runs are made in any case.

    Example::

        >>> numbers = torch.ones(64)
        >>> timed(numbers.sum, numbers.device, seconds=0.01).nanoseconds > 0
        True
    """
    watch = Stopwatch(run, device)

    def block() -> tuple[float, float]:
        taken = watch.block()
        return taken, taken * watch.calls

    return _repeated(block, seconds)


def timed_runs(run: Callable[[], object], device: torch.device, count: int) -> Timing:
    """Measure each of so many runs, two at least, after one beforehand: every process of a run makes as many.

    Example::

        >>> numbers = torch.ones(64)
        >>> timed_runs(numbers.sum, numbers.device, count=2).nanoseconds > 0
        True
    """
    _elapsed(run, device, 1)
    return of_runs([_elapsed(run, device, 1) for _ in range(count)])


def timed_beside(run: Callable[[], object], other: Stopwatch, device: torch.device, seconds: float = 0.1) -> Timing:
    """Measure a call in turns with another one, in billionths of what that takes: both have the same moments.

    Args:
        run: the call.
        other: times the other one.
        device: that both work on.
        seconds: see :func:`timed`, of both together.
    """
    watch = Stopwatch(run, device)

    def turn() -> tuple[float, float]:
        own, beside = watch.block(), other.block()
        return 1e9 * own / beside, own * watch.calls + beside * other.calls

    return _repeated(turn, seconds)


def timed_in_turns(runs: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.5) -> list[Timing]:
    """Measure several calls in turns: what disturbs a moment disturbs all of them.

    Args:
        runs: the calls.
        device: that they work on.
        seconds: see :func:`timed`, for each of them.

    Example::

        >>> small, large = torch.ones(64), torch.ones(1 << 20)
        >>> times = timed_in_turns([small.sum, large.sum], small.device, seconds=0.01)
        >>> times[0].nanoseconds < times[1].nanoseconds
        True
    """
    watches = [Stopwatch(run, device) for run in runs]
    turns: list[list[float]] = []

    def of_each() -> list[list[float]]:
        return [list(values) for values in zip(*turns, strict=True)]

    total = 0.0
    while len(turns) < _LEAST_BLOCKS or (
        len(turns) < _MOST_BLOCKS
        and total < 1e9 * seconds * len(watches)
        and any(_spread(values) > _STEADY for values in of_each())
    ):
        turns.append([watch.block() for watch in watches])
        total += sum(taken * watch.calls for taken, watch in zip(turns[-1], watches, strict=True))
    return [of_runs(values) for values in of_each()]


def _repeated(take: Callable[[], tuple[float, float]], seconds: float) -> Timing:
    """Take values, each with the nanoseconds that it took, until they agree or the time is over."""
    values: list[float] = []
    total = 0.0
    while len(values) < _LEAST_BLOCKS or (
        len(values) < _MOST_BLOCKS and total < 1e9 * seconds and _spread(values) > _STEADY
    ):
        value, taken = take()
        values.append(value)
        total += taken
    return of_runs(values)


class Stopwatch:
    """Times a call by itself, or, where it is short, several in a row.

    Args:
        run: the call; it is made twice beforehand.
        device: that it works on.

    Attributes:
        calls: that are timed at once.
    """

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self._run, self._device = run, device
        _elapsed(run, device, 1)
        self.calls = ceil(_BLOCK / max(1, _elapsed(run, device, 1)))

    def block(self) -> float:
        """Return the nanoseconds of a call, now."""
        return _elapsed(self._run, self._device, self.calls) / self.calls


def of_runs(runs: Sequence[float]) -> Timing:
    """Return the median and the spread of some runs, two at least."""
    middle = median(runs)
    faster = (middle - min(runs)) / middle
    spread = _spread(runs)
    return Timing(max(1, round(middle)), max(spread, faster) if faster > _FASTEST else spread)


def _spread(blocks: Sequence[float]) -> float:
    low, middle, high = quantiles(blocks, n=4)
    return (high - low) / middle


def _elapsed(run: Callable[[], object], device: torch.device, calls: int) -> int:
    """Return the nanoseconds of some calls, one after the other."""
    synchronize(device)
    start = perf_counter_ns()
    for _ in range(calls):
        run()
    synchronize(device)
    return perf_counter_ns() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; on the CPU nothing is left to wait for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
