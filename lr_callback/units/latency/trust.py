"""Trust: whether measured times can be believed, and what is said and done where they cannot.

How far repeated runs differ does not tell of a machine that stands still in each of them: where the threads of a
process wait for one that another program keeps from running, each step takes some milliseconds, and always the same.
So a small step is made by one thread and by all, and what is measured at different moments is compared: the layers one
by one, the layers in turns with the model, the model, and the model at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import monotonic, perf_counter_ns, sleep
from typing import TypeVar

import torch

from lr_callback.units.latency.timing import Timing, synchronize

Found = TypeVar("Found")

SPREAD_SAID, SPREAD_REFUSED = 0.15, 2.0
"""Spread of repeated runs that is warned of, and that is too much to decide by."""
EXCESS_SAID = 0.25
"""Part of the model's time by which that of its layers is more, from which on it is a contradiction."""
_CALL = 20_000
"""Nanoseconds by which the call of a layer by itself, with what it is made under, may take longer, at most."""
DRIFT_SAID = 1.0
"""Part of a time by which another of the same is more, from which on the two are of different machines, so to speak."""
ROUNDS = 3
"""How often a time that cannot be trusted is taken, at most."""
PATIENCE, PAUSE = 10.0, 0.1
"""Seconds for which a measurement waits in all, or measures again, and for which it waits at a time."""
_GRAIN = 2**15
"""Entries of a step that torch leaves to one thread; of more, each thread has as many at least."""
_STALL = 1_000_000
"""Nanoseconds from which on a wait is a thread's that is kept from running, and not of threads that wake up."""


BY_COUNT = ", or keep multiply-adds instead"
"""What can be done without a clock, where a budget is to be kept."""


class NoisyClockError(RuntimeError):
    """Times differ too much, or contradict each other too much, to choose by them."""


@dataclass(frozen=True)
class Doubt:
    """A reason not to trust times.

    Args:
        text: what was found, with its figures.
        excess: by what part one time is more than it should be, in comparison with another.
        said: excess from which on it is a doubt.

    Example::

        >>> told([Doubt("the model takes 4 ms at first, and 3 ms at the end", 0.33, said=1.0)])
    """

    text: str
    excess: float
    said: float

    @property
    def is_one(self) -> bool:
        """Whether there is a reason to doubt."""
        return self.excess > self.said


def compared(larger: float, smaller: float) -> float:
    """Return by what part of the smaller one a time is larger than another; below 0 where it is not."""
    return larger / max(1.0, smaller) - 1


def excess(own: float, whole: float, calls: int = 0) -> Doubt:
    """Doubt a model's time that is less than its layers': these are a part of it. Much more is none: all else is in it.

    Args:
        own: nanoseconds of the layers, all calls together.
        whole: nanoseconds of the model.
        calls: of the layers; each by itself takes some microseconds more than inside of the model.

    Example::

        >>> excess(30e6, 10e6).text
        'the layers take 30 ms by themselves, and the whole model 10 ms, though they are a part of it'
    """
    text = f"the layers take {_milliseconds(own)} by themselves, and the whole model {_milliseconds(whole)}, though "
    return Doubt(f"{text}they are a part of it", compared(own - calls * _CALL, whole), EXCESS_SAID)


def drift(what: str, first: float, then: float) -> Doubt:
    """Doubt times of which one is a multiple of another of the same: the machine was slower at one moment.

    Args:
        what: took ``first`` nanoseconds, and ``then``; as text, with two places for them.
        first: nanoseconds.
        then: nanoseconds.
    """
    text = what.format(_milliseconds(first), _milliseconds(then))
    return Doubt(text, max(compared(first, then), compared(then, first)), DRIFT_SAID)


def told(doubts: Iterable[Doubt], spread: float = 0.0, note: str = "", instead: str = "") -> None:
    """Warn of times that cannot be trusted, and refuse such as are too far from that.

    Args:
        doubts: of the times.
        spread: of repeated runs, a fraction of their median.
        note: what is known of the reason for it.
        instead: what else can be done than to measure anew.

    Raises:
        NoisyClockError: If they are.
    """
    runs = f"repeated runs differ by {spread:.0%} of their median (quartiles, the mean over all that was measured)"
    found = [one for one in [Doubt(runs + note, spread, SPREAD_SAID), *doubts] if one.is_one]
    text = "; ".join(one.text for one in found)
    if any(one.excess > SPREAD_REFUSED for one in found):
        raise NoisyClockError(
            f"Latency: the clock is too noisy to choose by: {text}. Measure while nothing else runs on this "
            f"machine{instead}."
        )
    if found:
        warnings.warn(
            f"Latency: {text}; times and what is chosen by them are as uncertain. Measure while nothing else runs on "
            "this machine.",
            stacklevel=3,
        )


def _milliseconds(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.3g} ms" if nanoseconds < 1e9 else f"{nanoseconds / 1e6:,.0f} ms"


def once(run: Callable[[], object], device: torch.device) -> int:
    """Return the nanoseconds of one call, now, the work that it leaves to the device included."""
    synchronize(device)
    start = perf_counter_ns()
    run()
    synchronize(device)
    return perf_counter_ns() - start


def waiting(device: torch.device) -> int:
    """Return for how many nanoseconds the threads of a short step wait for one that does not run, now; 0: for none.

    Each has as much to do as one alone has in another step, which takes as long where all of them run.

    Args:
        device: that is worked on; there is nothing to wait for but on a CPU, with several threads.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return 0
    alone, together = (torch.ones(_GRAIN * count) for count in (1, threads))
    own = min(once(alone.sigmoid_, device) for _ in range(3))
    wait = median(once(together.sigmoid_, device) for _ in range(5)) - own
    return round(wait) if wait > max(_STALL, 8 * own) else 0


class Patience:
    """Takes times while the machine is undisturbed, as far as a few attempts and seconds allow.

    Args:
        device: that is worked on.

    Attributes:
        wait: longest wait of threads for one another during a time that was taken, in nanoseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.wait = device, 0
        self._left = PATIENCE

    @property
    def note(self) -> str:
        """For how long threads waited, as text; how far that makes times uncertain is in their spread."""
        if not self.wait:
            return ""
        text = f", or are as uncertain: in each step the {torch.get_num_threads()} threads waited"
        return f"{text} {_milliseconds(self.wait)} for one another, as where other programs take their processors"

    @property
    def has_time(self) -> bool:
        """Whether there is time left to wait, or to measure again."""
        return self._left > 0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Let the seconds that pass meanwhile be of those that there are."""
        start = monotonic()
        try:
            yield
        finally:
            self._left -= monotonic() - start

    def timing(self, take: Callable[[], Timing], is_enough: Callable[[Timing], bool]) -> Timing:
        """Take a time, again where it is not to be trusted; return the one that is best to be.

        Args:
            take: measures it.
            is_enough: says whether a time is steady enough.
        """
        best, wait = self._taken(take)
        for _ in range(ROUNDS - 1):
            if is_enough(best) or not self.has_time:
                break
            with self.spending():
                again = self._taken(take)
            best, wait = min((best, wait), again, key=lambda one: one[0].spread)
        self.wait = max(self.wait, wait)
        return best

    def rounds(
        self, take: Callable[[], Found], is_doubtful: Callable[[Found], bool], forget: Callable[[], None]
    ) -> Found:
        """Measure, again where there are doubts; what these are of is forgotten, that of the last round, too.

        Args:
            take: measures what is not known.
            is_doubtful: says whether there are doubts.
            forget: lets times that may be wrong be unknown.
        """
        found = take()
        for _ in range(ROUNDS - 1):
            if not is_doubtful(found) or not self.has_time:
                break
            with self.spending():
                forget()
                sleep(PAUSE)
                found = take()
        if is_doubtful(found):
            forget()
        return found

    def _taken(self, take: Callable[[], Timing]) -> tuple[Timing, int]:
        """Return a time, and the wait of threads; the time is uncertain by one wait, as a part of it, at the least."""
        before = self._until_undisturbed()
        timing = take()
        wait = max(before, waiting(self.device))
        return Timing(timing.nanoseconds, max(timing.spread, wait / timing.nanoseconds)), wait

    def _until_undisturbed(self) -> int:
        """Pause while threads wait for one another, for seconds in all; return for how long they do at the end."""
        while (wait := waiting(self.device)) and self.has_time:
            with self.spending():
                sleep(PAUSE)
        return wait
