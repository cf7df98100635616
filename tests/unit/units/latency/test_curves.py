"""The time at every rank from that at some: against made-up hardware whose time is known at all of them."""

from math import ceil, gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr_callback.decisions.costs import CountedCost
from lr_callback.mathematics.folding import Geometry
from lr_callback.units.latency.curves import BLOCK, Curve, LayerTimes, MeasuredCost, measured_curve

FOLDING = "kernel_in_encoder"
NOTHING = 10**12


class Hardware:
    """Takes a time for each started block of a width, and remembers what it was asked."""

    def __init__(self, width: int = 1, block: int = BLOCK, start: int = 1000, each: int = 700) -> None:
        self.width, self.block, self.start, self.each = width, block, start, each
        self.asked: list[int] = []

    def time(self, rank: int) -> int:
        """Measure a rank."""
        self.asked.append(rank)
        return self.takes(rank)

    def takes(self, rank: int) -> int:
        """Return what a rank takes."""
        return self.start + self.each * ceil(self.width * rank / self.block)


hardware = st.builds(
    Hardware, st.integers(1, 40), st.sampled_from([8, BLOCK]), st.integers(1, 5000), st.integers(9, 900)
)


@given(hardware, st.integers(1, 700), st.integers(10, 90_000))
def test_a_rank_is_said_to_take_what_it_takes_or_nothing_is_said_of_it(machine, last, dense):
    curve = measured_curve(machine.time, last, dense, machine.width)
    if curve is None:
        assert machine.takes(1) >= dense
        return
    for rank, told in enumerate(curve.at_ranks(last, NOTHING).tolist()[1:], 1):
        off = 0.06 * machine.takes(rank) + machine.each  # a line through steps is off by one of them
        assert told in (NOTHING, pytest.approx(machine.takes(rank), abs=off)) or told >= dense


@given(hardware, st.integers(1, 700))
def test_ranks_of_whole_blocks_are_all_told(machine, last):
    curve = measured_curve(machine.time, last, 10**9, machine.width)
    told = curve.at_ranks(last, NOTHING).tolist()
    for rank in range(BLOCK // gcd(BLOCK, machine.width), last + 1, BLOCK // gcd(BLOCK, machine.width)):
        assert told[rank] == pytest.approx(machine.takes(rank), rel=0.06)


def test_what_is_slow_between_blocks_cannot_be_chosen():
    """As grouped convolutions are: a width that is no multiple of 8 takes twice as long."""
    curve = measured_curve(lambda rank: 100 * rank * (1 if rank % 8 == 0 else 2), 200, 10**9, 1)
    told = curve.at_ranks(200, NOTHING).tolist()
    assert [told[rank] for rank in (17, 20, 31, 33, 47, 127)] == [NOTHING] * 6
    assert [told[rank] for rank in (16, 32, 48)] == [1600, 3200, 4800]


@pytest.mark.parametrize("multiple", [7, 24, 32])
def test_ranks_of_a_multiple_are_the_ones_to_choose(multiple):
    machine = Hardware()
    curve = measured_curve(machine.time, 400, 10**9, 1, multiple)
    told = curve.at_ranks(400, NOTHING).tolist()
    for rank in range(multiple, 401, multiple):
        assert told[rank] == pytest.approx(machine.takes(rank), abs=0.06 * machine.takes(rank) + machine.each)
    assert measured_curve(machine.time, multiple - 1, 10**9, 1, multiple) is None


def test_a_first_rank_that_is_slow_does_not_hide_a_block_that_is_fast():
    curve = measured_curve(lambda rank: 390 if rank < 16 else 236 + rank, 64, 380, 1)
    assert curve.at(16) == 252


def test_a_line_takes_few_measurements():
    machine = Hardware()
    curve = measured_curve(machine.time, 640, 10**9, 1)
    assert len(machine.asked) == len(set(machine.asked)) <= 7
    assert (curve.step, curve.last) == (16, 640)
    assert curve.misfit < 1e-6


def test_what_is_no_line_is_measured_until_it_is_one():
    def cached_up_to_a_point(rank: int) -> int:
        return 100 * rank + (40_000 if rank > 200 else 0)

    curve = measured_curve(cached_up_to_a_point, 640, 10**9, 1)
    for rank in range(16, 641, 16):
        assert curve.at(rank) == pytest.approx(cached_up_to_a_point(rank), rel=0.06) or 192 < rank < 208


def test_smaller_blocks_of_other_hardware_are_found():
    curve = measured_curve(Hardware(block=4).time, 640, 10**9, 1)
    assert curve.step < 16


def test_few_ranks_are_each_measured():
    curve = measured_curve(Hardware(block=1).time, 11, 10**9, 1)
    assert list(curve.times) == [1, 2, 4, 8, 11]
    assert curve.at_ranks(11, NOTHING).tolist()[3:5] == [NOTHING, curve.times[4]]


@pytest.mark.parametrize("width", [4, 48])
def test_blocks_are_of_the_width_between_the_factors(width):
    assert measured_curve(Hardware(width).time, 200, 10**9, width).step == 16 // gcd(16, width)


def test_without_a_faster_rank_there_is_no_curve():
    machine = Hardware()
    assert measured_curve(machine.time, 100, machine.takes(1), 1) is None
    assert machine.asked == [16, 1]


def test_a_cost_is_what_was_measured_and_gates_what_is_slower():
    geometry = Geometry(64, 96)
    times = LayerTimes(500, {(FOLDING, 1): Curve(16, {16: 200, 32: 400, 48: 600})})
    cost = MeasuredCost(geometry, times, CountedCost(geometry))
    assert (cost.dense, cost.gates, cost.last_rank(FOLDING, 1), cost.last_rank(FOLDING, 2)) == (500, True, 32, 0)
    assert cost.at_ranks(FOLDING, 1, 60)[[5, 16, 20, 32, 48, 60]].tolist() == [500, 200, 500, 400, 600, 500]
    assert cost.at_ranks(FOLDING, 2, 3).tolist() == [500] * 4
    assert cost.at_ranks(FOLDING, 1, 3).dtype == torch.int64
    assert cost.slopes(FOLDING, [1]) is None
    assert cost.distinct_foldings([FOLDING, FOLDING]) == (FOLDING,)


def test_times_of_a_slower_machine_are_all_longer():
    times = LayerTimes(500, {(FOLDING, 1): Curve(16, {16: 200, 32: 400}, 0.01)})
    assert times.scaled(1.5) == LayerTimes(750, {(FOLDING, 1): Curve(16, {16: 300, 32: 600}, 0.01)})
