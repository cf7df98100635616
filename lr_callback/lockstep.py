"""Lockstep: several runs of a model at once, each of which waits at some layers until all have come there.

What a layer becomes can depend on its inputs in all batches, and the layers after it on what it has become. Run batch
by batch, everything before a layer would be computed again for each layer. Here each batch is one run, in a thread of
its own, which waits where it is told to: nothing is computed twice, and nothing need be known about the model.

Only one thread is at work at a time, and the order is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Semaphore, Thread, current_thread

import torch
from torch import Tensor


class _LeftError(BaseException):
    """Ends a run that waits and is not wanted any more; models that catch an ``Exception`` do not catch it."""


class Walk(Thread):
    """One run of a model that can be stopped and taken on.

    Args:
        run: calls the model; without gradients.
        before: whether it is a run of the model as it was before.

    Attributes:
        at: name of the layer where it waits; None: it has not begun, or is over.
        tensor: what it has brought there.
    """

    def __init__(self, run: Callable[[], object], before: bool) -> None:
        super().__init__(daemon=True)
        self.before = before
        self.at: str | None = None
        self.tensor: Tensor | None = None
        self._run_model = run
        self._error: BaseException | None = None
        self._leaves = self._over = False
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self.start()

    def run(self) -> None:
        """Run the model when told to; keep what it raises for :meth:`step`."""
        self._go.acquire()
        try:
            if not self._leaves:
                with torch.no_grad():
                    self._run_model()
        except _LeftError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.at, self.tensor, self._over = None, None, True
            self._stopped.release()

    def step(self) -> None:
        """Go on to the next layer where it waits, or to the end.

        Raises:
            BaseException: What the model raised.
        """
        if not self._over:
            self.at = self.tensor = None
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def step_to(self, name: str) -> Tensor | None:
        """Go on until it waits at a layer; return what it brings there, None if it does not come there."""
        while self.at != name and not self._over:
            self.step()
        return self.tensor

    def wait(self, name: str, tensor: Tensor) -> None:
        """Wait at a layer, from inside of the run."""
        self.at, self.tensor = name, tensor
        self._stopped.release()
        self._go.acquire()
        if self._leaves:
            raise _LeftError

    def leave(self) -> None:
        """End the run where it is."""
        self._leaves = True
        if not self._over:
            self._go.release()
        self.join()


def this_walk() -> Walk | None:
    """Return the run that the caller is part of, None outside of all."""
    thread = current_thread()
    return thread if isinstance(thread, Walk) else None


@contextmanager
def walks(runs: Iterable[Callable[[], object]], before: bool) -> Iterator[list[Walk]]:
    """Open a walk for each run, not begun; whatever happens, all are over in the end."""
    opened: list[Walk] = []
    try:
        for run in runs:
            opened.append(Walk(run, before))
        yield opened
    finally:
        for walk in opened:
            walk.leave()
