"""Workers: the analysis spread over cores, with the same bits whatever their number.

A matrix product split over threads sums in another order, so its last bits depend on the thread count. Each worker
here runs torch with one thread: a task's result depends on its input alone, and the tasks run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Map functions over items, on a pool of one-thread workers for CPU tensors.

    Args:
        pool: the executor, each thread of which has been told to use one torch thread; None: the calling thread does
            all the work, being a worker itself.
    """

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return ``[function(item) for item in items]``; the order is that of the items.

        Items that are tensors on another device than the CPU are worked off in this thread: their device is the
        parallel machine, and it needs no second queue.
        """
        listed = list(items)
        if self._pool is None or any(isinstance(item, Tensor) and item.device.type != "cpu" for item in listed):
            return [function(item) for item in listed]
        return list(self._pool.map(function, listed))

    def each_alone(self, function: Callable[[Item, Workers], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield ``function(item, workers)`` of each item, in their order.

        The items are worked off side by side; the workers that the function is given are the thread that it runs in.
        """
        alone = Workers(None)
        if self._pool is None:
            return (function(item, alone) for item in items)
        return self._pool.map(lambda item: function(item, alone), items)


@contextmanager
def workers() -> Iterator[Workers]:
    """Open as many one-thread workers as torch has threads; close them and restore torch's setting at the end.

    The calling thread, too, has one thread meanwhile.

    Example::

        >>> with workers() as crew:
        ...     crew.map(abs, [-1, 2])
        [1, 2]
    """
    threads = torch.get_num_threads()
    try:
        # The threads are not in the inference mode of the one that opens them, and must share their tensors with it.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            try:
                torch.set_num_threads(1)  # here too: a second thread waits in a loop, and takes a core from the pool
                yield Workers(pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an exception nobody waits for what is left
    finally:
        # Setting it in a worker also changes the default of threads that start later.
        torch.set_num_threads(threads)
