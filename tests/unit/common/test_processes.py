"""Processes: work shared out over ranks gives each of them what one would have made, or an error to all."""

import itertools
import multiprocessing
import time
import traceback

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze
from lr_callback.common.parallel import workers
from lr_callback.common.processes import Processes
from lr_callback.edits.build import build_layers, check_allocation

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def on_ranks(size, folder, work):
    """Return what a function of the processes returned on each of several ranks."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def start(rank):
        try:
            torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
            queue.put((rank, work(Processes(rank, size)), None))
            torch.distributed.destroy_process_group()
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))

    ranks = [context.Process(target=start, args=(rank,)) for rank in range(size)]
    for one in ranks:
        one.start()
    found = sorted((queue.get() for _ in ranks), key=lambda one: one[0])
    for one in ranks:
        one.join()
    assert [text for _, _, text in found] == [None] * size
    return [value for _, value, _ in found]


def test_one_process_needs_no_group():
    alone = Processes()
    assert alone.gather(lambda: 3) == [3]
    assert alone.first(lambda: None) is None
    assert alone.agree(lambda: "x") == "x"
    alone.send([torch.zeros(2)], 0)


def test_error_of_one_process_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        Processes().agree(lambda: 1 / 0)


@pytest.mark.parametrize("size", [2, 3])
def test_results_come_in_the_order_of_the_ranks(tmp_path, size):
    def work(processes):
        time.sleep(0.1 * (size - processes.rank))
        gathered = processes.gather(lambda: {"rank": processes.rank, "tensor": torch.full((2,), processes.rank)})
        return (
            [(one["rank"], one["tensor"].tolist()) for one in gathered],
            processes.first(lambda: f"of {processes.rank}"),
            processes.agree(lambda: processes.rank),
        )

    everything = [(rank, [rank, rank]) for rank in range(size)]
    assert on_ranks(size, tmp_path, work) == [(everything, "of 0", rank) for rank in range(size)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, MemoryError])
def test_error_of_a_rank_reaches_all_and_they_can_meet_again(tmp_path, kind):
    def work(processes):
        def fail():
            if processes.rank == 1:
                raise kind("broken")

        try:
            processes.agree(fail)
        except BaseException as error:
            return f"{type(error).__name__}: {error}", processes.gather(lambda: processes.rank)

    other = (
        f"RuntimeError: Another process of this run has failed, so this one stops too. rank 1: {kind.__name__}: broken"
    )
    found = on_ranks(3, tmp_path, work)
    assert found == [(other, [0, 1, 2]), (f"{kind.__name__}: broken", [0, 1, 2]), (other, [0, 1, 2])]


def test_error_of_the_first_rank_reaches_those_that_wait_for_its_result(tmp_path):
    def work(processes):
        with pytest.raises((OSError, RuntimeError), match="full disk") as failure:
            processes.first(lambda: (_ for _ in ()).throw(OSError("full disk")))
        return type(failure.value).__name__

    assert on_ranks(2, tmp_path, work) == ["OSError", "RuntimeError"]


TENSORS = {
    "float32": lambda: torch.randn(3, 4),
    "bfloat16": lambda: torch.randn(3, 4).bfloat16(),
    "float16": lambda: torch.randn(5).half(),
    "float64, one number": lambda: torch.randn((), dtype=torch.float64),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 4).t(),
    "a parameter": lambda: nn.Parameter(torch.randn(3)),
    "empty": lambda: torch.zeros(0, 3),
    "not a number": lambda: torch.tensor([torch.nan, torch.inf, -0.0]),
}


def test_tensors_of_every_kind_arrive_bit_for_bit(tmp_path):
    def work(processes):
        torch.manual_seed(processes.rank)
        tensors = [make() for make in TENSORS.values()]
        layouts = [one.stride() for one in tensors]
        processes.send(tensors, owner=1)
        assert [one.stride() for one in tensors] == layouts
        return [one.detach().contiguous().flatten().view(torch.uint8).tolist() for one in tensors]

    first, second, third = on_ranks(3, tmp_path, work)
    assert first == second == third


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 12, 3), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(64, 30), nn.Linear(30, 9))


def plain(analysis):
    return {
        name: (one.dense_cost, [(c.folding, c.num_slices, c.errors.tolist()) for c in one.candidates])
        for name, one in analysis.layers.items()
    }


@pytest.mark.parametrize("size", [2, 3, 6])
def test_analysis_and_factors_are_those_of_one_process_bit_for_bit(tmp_path, size):
    def made(processes, progress=None):
        model = network()
        analysis = analyze(model, processes=processes, progress=progress)
        allocation = analysis.allocate(0.5)
        with workers() as crew:
            layers = build_layers(check_allocation(model, allocation), allocation, crew, processes)
        state = {name: one.state_dict() for name, one in layers.items()}
        return plain(analysis), {name: {k: v.tolist() for k, v in one.items()} for name, one in state.items()}

    def work(processes):
        own = []
        return made(processes, lambda done, total, name: own.append(name)), own

    found = on_ranks(size, tmp_path, work)
    alone = made(None)
    assert all(result == alone for result, _ in found)
    assert sorted(itertools.chain.from_iterable(own for _, own in found)) == list(alone[0])
    assert max(len(own) for _, own in found) < len(alone[0])


def test_layer_that_is_made_dense_again_is_the_same_on_all(tmp_path):
    def work(processes):
        model = network()
        lrc.factorize_(model, lrc.allocate(model, 0.4))
        with torch.no_grad():
            model[3].encoder.weight.add_(processes.rank)
        allocation = lrc.allocate(model, 0.9, exclude="3")
        with workers() as crew:
            layers = build_layers(check_allocation(model, allocation), allocation, crew, processes)
        return type(layers["3"]).__name__, layers["3"].weight.tolist()

    first, second = on_ranks(2, tmp_path, work)
    assert first == second
    assert first[0] == "Linear"


@given(loads=st.lists(st.floats(0, 1e12), max_size=12), size=st.integers(1, 5))
def test_no_rank_has_more_than_another_by_more_than_one_item(loads, size):
    owners = Processes(0, size).owners(loads)
    assert owners == Processes(size - 1, size).owners(iter(loads)), "the same on every rank"
    totals = [sum(load for load, owner in zip(loads, owners, strict=True) if owner == rank) for rank in range(size)]
    assert len(owners) == len(loads)
    assert max(totals) - min(totals) <= max(loads, default=0) * (1 + 1e-9)


@given(loads=st.lists(st.integers(1, 50), min_size=1, max_size=6), size=st.integers(1, 3))
def test_share_of_the_slowest_rank_is_within_the_bound_of_the_shortest_possible(loads, size):
    def slowest(owners):
        return max(
            sum(load for load, owner in zip(loads, owners, strict=True) if owner == rank) for rank in range(size)
        )

    best = min(map(slowest, itertools.product(range(size), repeat=len(loads))))
    assert slowest(Processes(0, size).owners(loads)) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


def test_what_every_rank_has_computed_is_that_of_the_first_afterwards(tmp_path):
    def work(processes):
        own = [torch.full((2, 3), float(processes.rank)), torch.arange(4) + processes.rank]
        processes.share(own, torch.device("cpu"), "these")
        return [one.tolist() for one in own]

    first, second = on_ranks(2, tmp_path, work)
    assert first == second == [[[0.0] * 3] * 2, [0, 1, 2, 3]]


def test_ranks_that_have_other_tensors_are_told_before_any_is_sent(tmp_path):
    def work(processes):
        own = [torch.full((2,), float(processes.rank))] * (1 + processes.rank)
        with pytest.raises(
            RuntimeError, match=r"these must be the same on all 2 processes .*\[1, 2\] tensors on ranks"
        ):
            processes.share(own, torch.device("cpu"), "these")
        return own[0].tolist()

    assert on_ranks(2, tmp_path, work) == [[0.0, 0.0], [1.0, 1.0]]
