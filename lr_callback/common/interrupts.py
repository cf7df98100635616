"""Interrupts: signals wait while what they would break is done, and are then handled as they would have been.

A handler of Python runs between any two lines. One that raises (a person's Ctrl-C) between two meetings of the ranks
leaves the others waiting for this one; one that writes a checkpoint (SLURM's requeueing) writes one of half a surgery.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

_HELD = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT")
    if hasattr(signal, name)
)
"""Signals with which persons and clusters interrupt; those of timers and of faults are not among them."""


class _Hold:
    """Signals that wait, and whose handlers they wait for."""

    def __init__(self) -> None:
        found = {one: signal.getsignal(one) for one in _HELD}
        self.handlers: dict[int, Handler] = {one: handler for one, handler in found.items() if callable(handler)}
        self.noted: list[int] = []

    def start(self, *signals: int) -> None:
        """Let these signals wait from now on."""
        for one in signals:
            signal.signal(one, self._note)

    def stop(self, *signals: int) -> None:
        """Give these signals their handlers back, and handle those that came."""
        for one in signals:
            signal.signal(one, self.handlers[one])
        came = [one for one in self.noted if one in signals]
        self.noted[:] = [one for one in self.noted if one not in signals]
        for one in came:
            signal.raise_signal(one)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum not in self.noted:
            self.noted.append(signum)
        elif signum == signal.SIGINT:  # whoever presses Ctrl-C twice does not want to wait
            self.handlers[signum](signum, frame)


_HOLDS: list[_Hold] = []
"""The hold of now, if there is one."""


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait until the end of the block, where their handlers are called; a second Ctrl-C does not wait.

    Python handles signals in the main thread only: in another one, and inside of another such block, it does nothing.
    """
    if _HOLDS or not _is_main():
        yield
        return
    hold = _Hold()
    _HOLDS.append(hold)
    try:
        hold.start(*hold.handlers)
        yield
    finally:
        _HOLDS.clear()
        hold.stop(*hold.handlers)


@contextmanager
def live(only: int | None = None) -> Iterator[None]:
    """Let signals through for a part of a :func:`held` block that may take long, those first that came before it.

    Args:
        only: the one signal that is let through; None: all.
    """
    if not _HOLDS or not _is_main():
        yield
        return
    hold = _HOLDS[0]
    signals = [one for one in hold.handlers if only in (None, one)]
    try:
        hold.stop(*signals)
        yield
    finally:
        hold.start(*signals)
