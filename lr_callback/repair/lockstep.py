"""Lockstep: several runs of a model at once, each of which waits at some layers until all have come there.

What a layer becomes can depend on its inputs in all batches, and the layers after it on what it has become. Run batch
by batch, everything before a layer would be computed again for each layer. Here each batch is one run, in a thread of
its own, which waits where it is told to: nothing is computed twice, and nothing need be known about the model, but
that its runs do not mix: one that keeps a tensor on itself from layer to layer finds there what another run has put
(:func:`mixed`).

Only one thread is at work at a time, and the order is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Semaphore, Thread, current_thread

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_ROUNDING = 1e-2
"""Of the norm of an output: what two runs that are the same may differ by, in bfloat16."""


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
        is_over: whether it has come to the end, or failed.
    """

    def __init__(self, run: Callable[[], object], before: bool) -> None:
        super().__init__(daemon=True)
        self.before = before
        self.at: str | None = None
        self.tensor: Tensor | None = None
        self._run_model = run
        self._error: BaseException | None = None
        self._leaves = self.is_over = False
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
            self.at, self.tensor, self.is_over = None, None, True
            self._stopped.release()

    def step(self) -> None:
        """Go on to the next layer where it waits, or to the end.

        Raises:
            BaseException: What the model raised.
        """
        if not self.is_over:
            self.at = self.tensor = None
            with _own_default():
                self._go.release()
                self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def step_to(self, name: str) -> Tensor | None:
        """Go on until it waits at a layer; return what it brings there, None if it does not come there."""
        while self.at != name and not self.is_over:
            self.step()
        return self.tensor

    def wait(self, name: str, tensor: Tensor) -> None:
        """Wait at a layer, from inside of the run."""
        self.at, self.tensor = name, tensor
        with _own_default():
            self._stopped.release()
            self._go.acquire()
        if self._leaves:
            raise _LeftError

    def leave(self) -> None:
        """End the run where it is."""
        self._leaves = True
        with _own_default():
            if not self.is_over:
                self._go.release()
            self.join()


@contextmanager
def _own_default() -> Iterator[None]:
    """Give a thread back its dtype of new tensors, after another was at work: torch has one for all threads."""
    own = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(own)


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


def mixed(runs: Sequence[Callable[[], object]], alone: Sequence[object]) -> bool:
    """Return whether two runs, of before and of after, that wait for each other give something else than each alone.

    Args:
        runs: call the model.
        alone: what they gave one after the other.
    """
    given: dict[int, object] = {}

    def keep(place: int) -> None:
        given[place] = runs[place]()

    with walks([partial(keep, 0)], before=True) as one, walks([partial(keep, 1)], before=False) as other:
        both = [*one, *other]
        try:
            while not all(walk.is_over for walk in both):
                for walk in both:
                    walk.step()
        except Exception:  # such as shapes that do not fit: alone it went well
            return True
    return not all(_is_close(given[place], wanted) for place, wanted in enumerate(alone))


def _is_close(given: object, wanted: object) -> bool:
    """Compare the floating tensors that two runs returned; a repeated run is the same but for rounding."""
    pairs = zip(_floating(given), _floating(wanted), strict=True)
    return all(one.shape == other.shape and _distance(one, other) <= _ROUNDING for one, other in pairs)


def _floating(values: object) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor) and one.is_floating_point()]


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a fraction of that of the second, over their finite entries."""
    known = torch.isfinite(one) & torch.isfinite(other)
    wanted = other[known].double()
    off = float((one[known].double() - wanted).norm())
    return off / max(float(wanted.norm()), torch.finfo(torch.float64).tiny)
