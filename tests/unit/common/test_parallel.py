"""Workers: order, one torch thread each, and torch's setting left as it was."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lr_callback.common.parallel import Workers, workers


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_whoever_finishes_first(crew):
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert crew.map(slow_first, range(20)) == [item * item for item in range(20)]


def test_items_that_are_done_alone_are_worked_off_side_by_side_each_in_one_thread(crew):
    meet = threading.Barrier(2)

    def alone(item: int, alone: Workers) -> tuple[int, int, set[int]]:
        meet.wait(timeout=20)
        here = {threading.get_ident(), *alone.map(lambda _: threading.get_ident(), range(3))}
        return item, torch.get_num_threads(), here

    done = list(crew.each_alone(alone, range(4)))
    assert [(item, threads, len(here)) for item, threads, here in done] == [(item, 1, 1) for item in range(4)]
    assert list(Workers(None).each_alone(lambda item, _: -item, range(3))) == [0, -1, -2]


def test_no_items_give_no_results(crew):
    assert crew.map(abs, []) == []


def test_items_may_be_a_generator(crew):
    assert crew.map(abs, (-item for item in range(3))) == [0, 1, 2]


def test_the_calling_thread_takes_no_core_from_them(torch_threads):
    with workers():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == torch_threads


def test_each_worker_uses_one_torch_thread(crew):
    assert set(crew.map(lambda _: torch.get_num_threads(), range(8))) == {1}


def test_as_many_tasks_run_at_once_as_torch_has_threads(crew, torch_threads):
    barrier = threading.Barrier(torch_threads, timeout=30)  # breaks unless two tasks wait at it together
    assert sorted(crew.map(lambda _: barrier.wait(), range(torch_threads))) == [0, 1]


def test_tensors_on_another_device_are_worked_off_in_the_calling_thread(crew):
    seen = crew.map(lambda _: threading.get_ident(), [torch.zeros(1, device="meta")] * 3)
    assert seen == [threading.get_ident()] * 3


def test_tensors_on_the_cpu_are_worked_off_by_the_pool(crew):
    assert threading.get_ident() not in crew.map(lambda _: threading.get_ident(), [torch.zeros(1)] * 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_torch_threads_is_restored(threads):
    torch.set_num_threads(threads)
    with workers() as crew:
        crew.map(abs, range(8))
    started_later: list[int] = []
    later = threading.Thread(target=lambda: started_later.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert (torch.get_num_threads(), started_later) == (threads, [threads])


def test_an_error_in_a_task_reaches_the_caller_and_the_threads_are_restored():
    def fail(item: int) -> int:
        raise ArithmeticError(f"item {item}")

    with pytest.raises(ArithmeticError, match="item 3"), workers() as crew:
        crew.map(fail, [3])
    assert torch.get_num_threads() == 2


def test_workers_are_gone_when_the_block_ends():
    before = threading.active_count()
    with workers() as crew:
        crew.map(abs, range(8))
        assert threading.active_count() > before
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="shutdown"):
        crew.map(abs, [1])
