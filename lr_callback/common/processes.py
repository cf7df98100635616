"""Processes: work shared out over the ranks of a distributed run, so that all go on with the same bits or none does.

Ranks meet in one way only, :meth:`Processes.gather`: each does its part without talking to the others, and then all
tell each other the result or the error. No rank can wait for one that has failed. A person's Ctrl-C, too, is such an
error where the ranks are inside of :func:`lr_callback.common.interrupts.held`: it is kept for the next thing that a
rank does.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from lr_callback.common.interrupts import held, live

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The processes of a run; one by itself if not told otherwise.

    With ``size`` above 1 the default process group of ``torch.distributed`` must be of that size.

    Args:
        rank: of this process.
        size: number of processes.

    Example::

        >>> Processes().gather(lambda: "alone")
        ['alone']
    """

    rank: int = 0
    size: int = 1

    def gather(self, make: Callable[[], Value], long: bool = False) -> list[Value]:
        """Run a function on every rank, and return what all of them returned, in the order of the ranks.

        Args:
            make: must not talk to other ranks; returns plain data, with tensors on the CPU.
            long: whether it may take a while and changes nothing, so that what interrupts it need not wait.

        Raises:
            BaseException: Here, if ``make`` raised it here.
            RuntimeError: If it raised on another rank; the text says on which, and what.
        """
        if self.size == 1:
            return [_interruptible(make) if long else make()]
        try:
            own = _interruptible(make, signal.SIGINT, long)
        except BaseException as error:
            # The others must not wait for this rank; if there are none left, its own error still is the one to show.
            with suppress(Exception):
                self._exchange((None, f"{type(error).__name__}: {error}"))
            raise
        found = self._exchange((own, None))
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text is not None]
        if failures:
            raise RuntimeError(f"Another process of this run has failed, so this one stops too. {'; '.join(failures)}")
        return [value for value, _ in found]

    def _exchange(self, message: tuple[object, str | None]) -> list[Any]:
        found: list[Any] = [None] * self.size
        with held():
            torch.distributed.all_gather_object(found, message)
        return found

    def agree(self, make: Callable[[], Value], long: bool = False) -> Value:
        """Run a function on every rank and return this rank's result, if it failed on none; see :meth:`gather`."""
        results: list[Value] = []
        self.gather(lambda: results.append(make()), long)
        return results[0]

    def first(self, make: Callable[[], Value]) -> Value:
        """Run a function on rank 0, and return its result everywhere; see :meth:`gather`."""
        return self.gather(lambda: [make()] if self.rank == 0 else [])[0][0]

    def owners(self, loads: Iterable[float]) -> list[int]:
        """Share out items over the ranks: the largest first, each to the rank with the least to do so far.

        Args:
            loads: how long each item takes, in any unit; the same on every rank.

        Returns:
            The rank of each item.

        Source: R. L. Graham, Bounds on multiprocessing timing anomalies, 1969 (LPT): the last rank is done within
        ``4/3 - 1/(3 size)`` of the shortest time possible.

        Example::

            >>> Processes(rank=0, size=2).owners([1, 8, 3, 5])
            [0, 0, 1, 1]
        """
        listed = list(loads)
        totals = [0.0] * self.size
        owners = [0] * len(listed)
        for index in sorted(range(len(listed)), key=lambda index: -listed[index]):
            owners[index] = min(range(self.size), key=totals.__getitem__)
            totals[owners[index]] += listed[index]
        return owners

    def send(self, tensors: Sequence[Tensor], owner: int, device: torch.device | None = None) -> None:
        """Overwrite tensors on every rank with those of their owner, bit for bit.

        Args:
            tensors: of the same shapes and dtypes on all ranks.
            owner: rank that has the values.
            device: that the process group works on; None: that of the tensors.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            # As bytes: a backend need not know the dtype. Contiguous: the memory formats of ranks may differ.
            flat = tensor.detach().to(device or tensor.device).contiguous().flatten().view(torch.uint8)
            torch.distributed.broadcast(flat, owner)
            if self.rank != owner:
                with torch.no_grad():
                    tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def share(self, tensors: Sequence[Tensor], device: torch.device, what: str) -> None:
        """Overwrite tensors that every rank has computed by itself with those of rank 0, bit for bit.

        Args:
            tensors: on any device.
            device: that the process group works on.
            what: they are, for the text.

        Raises:
            RuntimeError: If the ranks have different ones: another number, other shapes or dtypes. None was sent.
        """
        found = self.gather(lambda: [f"{tuple(one.shape)} {one.dtype}" for one in tensors])
        if any(other != found[0] for other in found):
            raise RuntimeError(
                f"LowRankCompression: {what} must be the same on all {self.size} processes of the run, they are not: "
                f"{[len(one) for one in found]} tensors on ranks 0 to {self.size - 1}, or of other shapes. Let each "
                "process hold the same, and update it at the same steps. Nothing was changed."
            )
        self.send(tensors, 0, device)


def _interruptible(make: Callable[[], Value], only: int | None = None, during: bool = True) -> Value:
    """Handle the signals that came, then run a function, during which they wait or not."""
    if during:
        with live(only):
            return make()
    with live(only):
        pass
    return make()


def by_name(parts: Iterable[Mapping[Key, Value]]) -> dict[Key, list[Value]]:
    """List what the ranks have under each name, in the order of the ranks; one that lacks a name is left out of it.

    Example::

        >>> by_name([{"one": 1, "two": 2}, {"two": 3}])
        {'one': [1], 'two': [2, 3]}
    """
    found: dict[Key, list[Value]] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, []).append(value)
    return found


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits.

    Example::

        >>> digest(torch.ones(3)) == digest(torch.ones(3)), digest(torch.ones(3)) == digest(torch.zeros(3))
        (True, False)
    """
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()
