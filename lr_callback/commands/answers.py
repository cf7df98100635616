"""Answers: the parser that all commands share, and what it says of a wrong command line and of a refusal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partialmethod
from typing import NoReturn

from jsonargparse import ArgumentParser

from lr_callback.commands.places import reworded
from lr_callback.commands.wording import plain
from lr_callback.common.table import on_one_line

_CALLED = {"source": "checkpoint", "path": "output", "example_input": "input_shape"}
"""Arguments of functions -> those of command lines that are theirs by another name."""


class Parser(ArgumentParser):
    """A parser that takes no abbreviated names, and says in plain words what is wrong."""

    # A name that is near to another is more often a slip than an abbreviation.
    __init__ = partialmethod(ArgumentParser.__init__, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process, or raise where the parser is made to; show how the command is called."""
        # What does not end here is caught by another parser, which knows more of the names.
        own = getattr(ex, "subcommand_parser", None) or self
        super().error(plain(message, _options(own)) if self.exit_on_error else message, ex)

    def refuse(self, error: BaseException, names: Mapping[str, str] | None = None) -> NoReturn:
        """End the process with what is refused, on one line, by the names of the command line.

        Args:
            error: with a text that names arguments of functions.
            names: of those -> what they are called on the command line; None: as this parser has them.
        """
        text = plain(reworded(error, option_names(self) if names is None else names), _options(self))
        sys.stderr.write(f"error: {on_one_line(text, most=len(text))}\n")
        sys.exit(2)


def option_names(parser: ArgumentParser) -> dict[str, str]:
    """Return for names of arguments of functions the options of a parser; for none that is the end of several."""
    options = [option.removeprefix("--") for option in _options(parser)]
    ends = [option.rpartition(".")[2] for option in options]
    named = {end: f"--{option}" for end, option in zip(ends, options, strict=True) if ends.count(end) == 1}
    named |= {option: f"--{option}" for option in options if "." not in option}
    return named | {name: f"--{option}" for name, option in _CALLED.items() if option in options}


def _options(parser: ArgumentParser) -> list[str]:
    found = [option for action in parser._actions for option in action.option_strings]
    return [one for one in dict.fromkeys(found) if one.startswith("--") and not one.endswith(("+", ".help"))]
