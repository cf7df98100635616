"""Attempts: what a page is to say, as far as it can be had; what cannot is noted, or raised where a user has asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from lr_callback.commands.places import is_exit, is_refusal, raised_in_own_code, text_of
from lr_callback.page.facts import Missing

Found = TypeVar("Found")

_MEND = "mend that, and make the page again"


class Attempts:
    """What is tried, and what the page goes without.

    Args:
        arguments: the command line. What a user names and this package refuses is an error, and not a page without it;
            an error in the user's own code costs the page only what that code was run for.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._names = {_name(one) for one in arguments}
        self.missing: list[Missing] = []

    def are_asked(self, *names: str) -> bool:
        """Return whether one of some arguments is given."""
        return not self._names.isdisjoint(names)

    def lack(self, what: str) -> bool:
        """Return whether the page goes without something."""
        return any(one.what == what for one in self.missing)

    def words(self, *names: str) -> list[str]:
        """Return the words of the command line that belong to some arguments, in their order."""
        return [word for word, name in self._named() if name in names]

    def words_without(self, *names: str) -> list[str]:
        """Return the other words of the command line."""
        return [word for word, name in self._named() if name not in names]

    def _named(self) -> list[tuple[str, str]]:
        """Return each word with the name of the argument that it belongs to."""
        found, inside = [], ""
        for word in self._arguments:
            inside = _name(word) if word.startswith("--") else inside
            found.append((word, inside))
        return found

    def make(self, what: str, way: str, run: Callable[[], Found], *asked: str) -> Found | None:
        """Return what a call returns; if it raises, note that the page goes without.

        Args:
            what: it is.
            way: to have it.
            run: the call.
            asked: arguments; with one of them a refusal is raised.
        """
        try:
            return run()
        except (Exception, SystemExit) as error:  # whatever a user's model and data raise
            if is_exit(error) or (self.are_asked(*asked) and is_refusal(error)):
                raise
            self.note_error(what, way, error)
            return None

    def note_error(self, what: str, way: str, error: BaseException) -> None:
        """Note what the page goes without for an error: where that is of the user's code, what, and where it is."""
        own = raised_in_own_code(error)
        if own is None:
            self.note(Missing(what, _told(error), way))
        elif is_refusal(error):
            self.note(Missing(what, f"{_told(error)} ({own.place})", way))
        else:
            self.note(Missing(what, str(own), _MEND))

    def note(self, missing: Missing) -> None:
        """Note what the page goes without; what is missing for the same reason is said in one line."""
        for index, known in enumerate(self.missing):
            if known.why == missing.why:
                way = known.way if missing.way in known.way else f"{known.way}; or {missing.way}"
                self.missing[index] = replace(known, what=f"{known.what}, {missing.what}", way=way)
                return
        self.missing.append(missing)


def _name(word: str) -> str:
    return word.partition("=")[0].partition(".")[0]


def _told(error: BaseException) -> str:
    kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
    return f"{kind}{text_of(error)}"
