"""Attempts: what a page is to say, as far as it can be had; what cannot is noted, or raised where a user has asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lr_callback.page.facts import Missing

Found = TypeVar("Found")


class Attempts:
    """What is tried, and what the page goes without.

    Args:
        arguments: the command line. What a user names and cannot be had is an error, and not a page without it.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._names = {_name(one) for one in arguments}
        self.missing: list[Missing] = []

    def are_asked(self, *names: str) -> bool:
        """Return whether one of some arguments is given."""
        return not self._names.isdisjoint(names)

    def words(self, *names: str) -> list[str]:
        """Return the words of the command line that belong to some arguments, in their order."""
        found, inside = [], False
        for word in self._arguments:
            inside = _name(word) in names if word.startswith("--") else inside
            found += [word] * inside
        return found

    def make(self, what: str, way: str, run: Callable[[], Found], *asked: str) -> Found | None:
        """Return what a call returns; if it raises, note that the page goes without.

        Args:
            what: it is.
            way: to have it.
            run: the call.
            asked: arguments; with one of them an error is raised.
        """
        try:
            return run()
        except Exception as error:  # whatever a user's model and data raise
            if self.are_asked(*asked):
                raise
            self.missing.append(Missing(what, _told(error), way))
            return None


def _name(word: str) -> str:
    return word.partition("=")[0].partition(".")[0]


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:400]}"
