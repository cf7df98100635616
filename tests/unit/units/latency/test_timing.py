"""How long a call takes: never less than it sleeps, and what runs differ by."""

from itertools import cycle
from time import sleep

import torch

from lr_callback.units.latency import Stopwatch, timed
from lr_callback.units.latency.timing import timed_beside

CPU = torch.device("cpu")


def test_a_call_takes_what_it_sleeps_at_least():
    assert timed(lambda: sleep(0.002), CPU).nanoseconds >= 2_000_000


def test_runs_that_differ_are_told():
    naps = cycle([0.001, 0.02])
    assert timed(lambda: sleep(next(naps)), CPU).spread > 0.5


def test_short_calls_are_timed_together():
    count = []
    watch = Stopwatch(lambda: count.append(1), CPU)
    before = len(count)
    assert 0 < watch.block() < 200_000
    assert len(count) - before == watch.calls > 1


def test_a_long_call_is_timed_by_itself():
    assert Stopwatch(lambda: sleep(0.001), CPU).calls == 1


def test_a_call_is_timed_in_turns_with_another():
    other = Stopwatch(lambda: sleep(0.002), CPU)
    share = timed_beside(lambda: sleep(0.001), other, CPU)
    assert 0 < share.nanoseconds < 1e9  # billionths of the other one


def test_a_pause_in_one_of_the_runs_does_not_decide():
    """Five pairs at least, of which the median counts."""
    naps = iter([0.001] * 4 + [0.05] + [0.001] * 500)
    share = timed_beside(lambda: sleep(0.001), Stopwatch(lambda: sleep(next(naps)), CPU), CPU)
    assert share.nanoseconds > 0.3e9
