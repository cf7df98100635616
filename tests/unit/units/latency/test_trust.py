"""When times are not believed, what is said then, and when they are taken again; all of it with given times."""

from itertools import chain, repeat

import pytest
import torch

from lr_callback.units.latency import NoisyClockError, Timing, compared, drift, excess, told
from lr_callback.units.latency import trust as trust_file
from lr_callback.units.latency.trust import ROUNDS, Patience, waiting

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def steps_take(monkeypatch, two_threads):
    """Let a step of one thread take some nanoseconds, and one of both."""

    def give(alone, together):
        times = chain([alone] * 3, [together] * 5)
        monkeypatch.setattr(trust_file, "once", lambda *_: next(times))

    return give


@pytest.fixture
def threads_wait(monkeypatch):
    """Let threads wait for given nanoseconds, whenever that is asked, and the last of them from then on."""

    def give(*waits):
        left = chain(waits, repeat(waits[-1]))
        monkeypatch.setattr(trust_file, "waiting", lambda _: next(left))

    return give


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(trust_file, "PAUSE", 0.0)


def test_a_noisy_clock_is_told_and_one_that_tells_nothing_refused():
    told([], 0.1)
    with pytest.warns(UserWarning, match="repeated runs differ by 30% of their median .* Measure while nothing else"):
        told([], 0.3)
    with pytest.raises(NoisyClockError, match="too noisy to choose by: repeated runs differ by 220% of their median"):
        told([], 2.2)


def test_layers_that_take_longer_than_their_model_are_a_contradiction():
    told([excess(0.224e6, 0.155e6, calls=12)])  # each call by itself takes some microseconds more
    told([excess(1.2e6, 1e6), excess(1e6, 5e9)])  # a large rest is none: attention is not in layers
    with pytest.warns(UserWarning, match="the layers take 1.3 ms by themselves, and the whole model 1 ms, though they"):
        told([excess(1.3e6, 1e6)])
    match = (
        r"too noisy to choose by: the layers take 31.7 ms by themselves, and the whole model 0.768 ms, though they are"
    )
    with pytest.raises(NoisyClockError, match=match):
        told([excess(31.7e6, 0.768e6)])


def test_the_same_at_two_moments_may_differ_by_less_than_double():
    told([drift("{} and {}", 1.9e6, 1e6), drift("{} and {}", 1e6, 1.9e6)])
    with pytest.warns(UserWarning, match="it takes 2.5 ms at first, and 1 ms at the end; times and what is chosen"):
        told([drift("it takes {} at first, and {} at the end", 2.5e6, 1e6)])
    with pytest.raises(NoisyClockError, match=r"12\.7 ms, then 110 ms\. Measure while nothing else"):
        told([drift("{}, then {}", 12_725e3, 109_969e3)])


def test_all_reasons_are_told_at_once():
    with pytest.warns(UserWarning, match="differ by 20% .*; the layers take 2 ms .*; 1 ms, then 2.5 ms; times and"):
        told([excess(2e6, 1e6), drift("{}, then {}", 1e6, 2.5e6)], 0.2)


def test_a_part_is_of_the_smaller_one():
    assert (compared(3, 2), compared(1, 2), compared(5, 0)) == (0.5, -0.5, 4)


@pytest.mark.parametrize(
    ("alone", "together", "wait"),
    [
        (13_000, 12_013_000, 12_000_000),  # a processor was given to another program
        (13_000, 20_000, 0),
        (13_000, 900_000, 0),  # many threads that wake up
        (1_000_000, 5_000_000, 0),  # a slow machine
    ],
)
def test_threads_that_wait_are_seen_in_a_short_step(alone, together, wait, steps_take):
    steps_take(alone, together)
    assert waiting(CPU) == wait


def test_one_thread_waits_for_none():
    assert torch.get_num_threads() == 1
    assert waiting(CPU) == 0
    assert waiting(torch.device("meta")) == 0


def steady(timing):
    return timing.spread <= 0.25


def test_a_time_is_taken_again_until_it_is_steady():
    times = iter([Timing(50, 0.9), Timing(10, 0.1), Timing(9, 0.0)])
    assert Patience(CPU).timing(lambda: next(times), steady) == Timing(10, 0.1)


def test_the_steadiest_of_a_few_times_counts():
    times = [Timing(50, 0.9), Timing(20, 0.5), Timing(30, 0.7), Timing(10, 0.0)]
    left = iter(times)
    assert Patience(CPU).timing(lambda: next(left), steady) == times[1]
    assert len(list(left)) == len(times) - ROUNDS


def test_no_time_is_taken_again_when_the_seconds_are_over(monkeypatch):
    monkeypatch.setattr(trust_file, "PATIENCE", 0.0)
    times = iter([Timing(50, 0.9), Timing(10, 0.1)])
    assert Patience(CPU).timing(lambda: next(times), steady) == Timing(50, 0.9)


def test_a_time_waits_for_a_machine_that_is_undisturbed(threads_wait):
    threads_wait(8_000_000, 8_000_000, 0)
    patience = Patience(CPU)
    assert patience.timing(lambda: Timing(100_000, 0.01), steady) == Timing(100_000, 0.01)
    assert (patience.wait, patience.note) == (0, "")


def test_what_is_measured_while_threads_wait_is_as_uncertain_however_steady(threads_wait, monkeypatch):
    """264 ms with a spread of 0.8 %, where 0.8 ms were right."""
    monkeypatch.setattr(trust_file, "PATIENCE", 0.0)
    threads_wait(12_000_000)
    patience = Patience(CPU)
    assert patience.timing(lambda: Timing(24_000_000, 0.008), steady) == Timing(24_000_000, 0.5)
    assert patience.wait == 12_000_000
    with pytest.warns(UserWarning, match="by 50% .*, or are as uncertain: in each step the 1 threads waited 12 ms for"):
        told([], 0.5, patience.note)


def test_rounds_end_without_a_doubt_and_forget_what_there_is_one_of():
    for answers, forgotten in (([1], 0), ([5, 1], 1), ([5, 5, 5], ROUNDS)):
        assert rounds_of(answers) == (answers[-1], forgotten)


def rounds_of(answers):
    """Return what is found, and how often something is forgotten; above 1 an answer is doubtful."""
    given, forgets = iter(answers), []
    found = Patience(CPU).rounds(lambda: next(given), lambda one: one > 1, lambda: forgets.append(1))
    assert list(given) == []
    return found, len(forgets)
