"""Wording: what a parser says of a wrong command line, in plain words and by the names of its arguments."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lr_callback.common.table import on_one_line

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_FOUND = (re.compile(r"Got value: (.+)"), re.compile(r"Given value: (.+)"))
_TYPE = re.compile(r"Expected (?:an? )?(?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[([^\]]*)\])")
_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "- Expected a path but",
    "- Expected a <class 'None",
    "- Expected <class 'None",
)
_TYPES = {
    "bool": "true or false",
    "dict": "names and values, as '{name: value}'",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "text",
}


@dataclass(frozen=True)
class _Fault:
    """What is wrong with one argument.

    Args:
        text: of the parser.
        options: of the command, each with its dashes.
    """

    text: str
    options: Collection[str]

    @property
    def option(self) -> str:
        """The argument, by the path of all names that lead to it."""
        return f"--{'.'.join(dict.fromkeys(_KEY.findall(self.text)))}"

    @property
    def found(self) -> str:
        """What was given for it; the innermost, where one value is in another."""
        return next((match[1] for match in (one.search(self.text) for one in _FOUND) if match), "none")

    @property
    def class_path(self) -> str:
        """The class whose arguments these are, empty if none is named; the innermost."""
        return str((_CLASS.findall(self.text) or [""])[-1])


def plain(text: str, options: Collection[str]) -> str:
    r"""Return what is wrong with a command line on one line.

    Args:
        text: of the parser; one that this function does not know is given back on one line, whole.
        options: of the command, each with its dashes.

    Example::

        >>> plain("unrecognized arguments: --keep-ratio 0.5", ["--keep_ratio"])
        '--keep-ratio: there is no such argument; did you mean --keep_ratio?'
        >>> plain('Parser key "epochs":\n  Expected a <class \'int\'>. Got value: many', ["--epochs"])
        '--epochs must be a whole number, got many.'
    """
    fault = _Fault(text, options)
    rows: _Rows = _SAID if _KEY.search(text) else _SAID_OF_THE_LINE
    for pattern, words in rows:
        match = pattern.search(text)
        if match:
            return words(fault, match)
    lines = [line.removeprefix("- ") for line in map(str.strip, text.splitlines()) if not line.startswith(_NOISE)]
    told = _KEY.sub(lambda match: f"--{match[1]}", " ".join(lines))
    return on_one_line(told, most=len(told))


def nearest(name: str, known: Collection[str], otherwise: str = ".") -> str:
    """Return the end of a message that names what may have been meant.

    Args:
        name: that there is not.
        known: those that there are.
        otherwise: the end where none of them is near.
    """
    near = get_close_matches(name.replace("-", "_"), [one.replace("-", "_") for one in known], n=1)
    return f"; did you mean {_as_known(near[0], known)}?" if near else otherwise


def _as_known(near: str, known: Collection[str]) -> str:
    return next(one for one in known if one.replace("-", "_") == near)


def _unknown(fault: _Fault, match: re.Match[str]) -> str:
    names = [word.partition("=")[0] for word in match[1].split() if word.startswith("--")]
    if not names:
        return f"{match[1]}: each value must follow the name of its argument, as --name value, found none before it."
    return f"{names[0]}: there is no such argument{nearest(names[0], fault.options)}"


def _not_in_a_file(fault: _Fault, match: re.Match[str]) -> str:
    name = match[1] or match[2]
    return f"{name}: a configuration has no such argument{nearest(f'--{name}', fault.options)}"


def _not_taken(fault: _Fault, match: re.Match[str]) -> str:
    known = [f"{fault.option}.{name}" for name in _parameters(fault.class_path)]
    option = f"{fault.option}.{match[1]}"
    takes = f"; there are {', '.join(known)}." if known else "."
    return f"{option}: {fault.class_path or fault.option} has no such argument{nearest(option, known, takes)}"


def _parameters(class_path: str) -> Sequence[str]:
    """Return the names of what a class is made with, none where it cannot be looked at."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(sys.modules[module], name)).parameters)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _no_value(fault: _Fault, match: re.Match[str]) -> str:
    return f"{match[1]}: a value must follow, found none; one that begins with a dash as {match[1]}=-1."


def _required(fault: _Fault, match: re.Match[str]) -> str:
    return ", ".join(_option(name, fault.options) for name in match[1].split(", ")) + " must be given, got none."


def _option(name: str, options: Collection[str]) -> str:
    return f"--{name if f'--{name}' in options else name.partition('.')[2] or name}"


def _required_by_a_class(fault: _Fault, match: re.Match[str]) -> str:
    options = ", ".join(f"{fault.option}.{name}" for name in match[1].split(", "))
    return f"{fault.option} {fault.class_path}: must be given its arguments {options}, got none."


def _no_attribute(fault: _Fault, match: re.Match[str]) -> str:
    module, name = match[1], match[2]
    known = [one for one in dir(sys.modules.get(module)) if not one.startswith("_")]
    near = nearest(name, known, "; see how it is spelled.")
    return f"{fault.option} {fault.class_path}: must be there, found no {name} in {module}{near}"


def _no_module(fault: _Fault, match: re.Match[str]) -> str:
    named = f"{fault.option} {fault.class_path or fault.found}"
    if not f"{fault.class_path or fault.found}.".startswith(f"{match[1]}."):
        return f"{named}: what it imports must be installed, found no module {match[1]!r}; install it."
    return (
        f"{named}: no module {match[1]!r} is found from here; name the class by the path that your program imports it "
        "by, in the folder in which it does."
    )


def _no_path(fault: _Fault, _: re.Match[str]) -> str:
    return (
        f"{fault.option} must name a class by the path that it is imported by, as my_module.MyClass, got {fault.found}."
    )


def _several(fault: _Fault, match: re.Match[str]) -> str:
    return (
        f"{fault.option} must name one class, got {fault.found}, which several are called: {match[1]}; name its path."
    )


def _no_subclass(fault: _Fault, match: re.Match[str]) -> str:
    return f"{fault.option} must name a {match[2]}, found {match[1] or fault.found}, which is another class; name one."


def _no_file(fault: _Fault, match: re.Match[str]) -> str:
    return f"{fault.option} {match[1]}: no such file."


def _wrong_type(fault: _Fault, _: re.Match[str]) -> str:
    types = dict.fromkeys(_TYPE.findall(fault.text))
    found = fault.found
    words = [_type(name, choices) for name, choices in types if name != "NoneType"]
    if words == [_TYPES["list"]]:
        words = [f"a list, as '[{found}]'" if re.fullmatch(r"[\d.]+", found) else f"a list, as '[\"{found}\"]'"]
    return f"{fault.option} must be {' or '.join(words) or 'null'}, got {found}."


def _type(name: str, choices: str) -> str:
    return f"one of {choices}" if choices else _TYPES.get(name, f"a {name}")


_Rows = Sequence[tuple[re.Pattern[str], Callable[[_Fault, re.Match[str]], str]]]
_SAID_OF_THE_LINE: _Rows = (
    (re.compile(r"^unrecognized arguments: (.+)"), _unknown),
    (
        re.compile(r"^(?:Subcommand '\w+' does not accept option '([^']+)'|Option '([^']+)' is not accepted)"),
        _not_in_a_file,
    ),
    (re.compile(r"^the following arguments are required: (.+)"), _required),
    (re.compile(r"^argument (--[\w.]+): expected one argument"), _no_value),
)
"""What is said of a whole command line -> its words."""
_SAID: _Rows = (
    (re.compile(r"Option '([^']+)' is not accepted"), _not_taken),
    (re.compile(r"arguments are required: (.+)"), _required_by_a_class),
    (re.compile(r"module '([^']+)' has no attribute '([^']+)'"), _no_attribute),
    (re.compile(r"No module named '([^']+)'"), _no_module),
    (re.compile(r"Multiple subclasses with name .+: (.+)\."), _several),
    (re.compile(r"Expected a dot import path string|Unexpected import path format"), _no_path),
    (re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)"), _no_subclass),
    (re.compile(r"File does not exist: '(.+)'"), _no_file),
    (_TYPE, _wrong_type),
)
"""What is said of one argument -> its words; the first that matches, so that the innermost reason comes first."""
