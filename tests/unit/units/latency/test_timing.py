"""How long a call takes: never less than it sleeps, and what runs differ by."""

from itertools import cycle
from time import sleep

import torch

from lr_callback.units.latency import Stopwatch, timed, timed_in_turns
from lr_callback.units.latency.timing import of_runs, timed_beside

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


def test_calls_in_turns_have_the_same_moments():
    """Each is made once in each turn, so that what slows a moment down slows all."""
    order = []
    times = timed_in_turns(
        [lambda: order.append(0) or sleep(0.001), lambda: order.append(1) or sleep(0.002)], CPU, 0.05
    )
    assert times[0].nanoseconds >= 1_000_000 and times[1].nanoseconds >= 2_000_000
    turns = order[4:]  # after those that are made beforehand
    assert len(turns) >= 10 and turns == [0, 1] * (len(turns) // 2)


def test_a_run_that_is_much_faster_than_the_others_shows_that_these_were_held_up():
    """However alike they are: quartiles say nothing of it."""
    assert of_runs([8, 8, 1, 8, 8, 8, 8]).spread == 7 / 8
    assert of_runs([8, 8, 5, 8, 8, 8, 8]).spread == 0
