"""Written: plain data that came from a file or a person, checked before anything of it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

Kind = type | tuple[type, ...]
"""A type that a value may be of, or several."""

_LARGEST = 2**63
_DEEPEST = 8


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, and no switch.

    Example::

        >>> is_number(2), is_number(0.5), is_number(True), is_number("2")
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def describe(value: object) -> str:
    """Return the type of a value and the beginning of its text, whatever it is.

    Example::

        >>> describe([1, 2])
        "list '[1, 2]'"
    """
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in a list ...
        return f"{type(value).__name__}, too large to be shown"
    return f"{type(value).__name__} {text[:60]!r}"


def check_fields(written: Mapping[Any, Any], fields: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """Return the named fields of a written value.

    Args:
        written: may have more.
        fields: name -> type; ``bool`` is no number.
        where: begins the text of an error.

    Raises:
        ValueError: If one is missing, of another type, or a whole number beyond 64 bits.

    Example::

        >>> check_fields({"rank": 3, "more": None}, {"rank": int}, "Layer 'head'")
        {'rank': 3}
    """
    for name, kind in fields.items():
        if name not in written:
            found = sorted(map(describe, written))[:20]
            raise ValueError(f"{where}: `{name}` is missing, found {_keys(written) or found}; {_DAMAGED}")
        value = written[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where}: `{name}` must be {_kinds(kind)}, got {describe(value)}.")
        if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise ValueError(f"{where}: `{name}` must be a whole number of 64 bits, got one of more; {_DAMAGED}")
    return {name: written[name] for name in fields}


_DAMAGED = "the file is damaged or foreign."


def _keys(written: Mapping[Any, Any]) -> list[str]:
    return sorted(name for name in written if isinstance(name, str))[:20]


def _kinds(kind: Kind) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def is_plain(value: object, depth: int = _DEEPEST) -> bool:
    """Return whether a value is made of what JSON knows, not deeply nested.

    Example::

        >>> is_plain({"max_slices": None, "foldings": ["a"]}), is_plain({1: set()})
        (True, False)
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return not isinstance(value, int) or abs(value) < _LARGEST
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(one, depth - 1) for one in value)
    if not isinstance(value, dict) or not depth:
        return False
    return all(isinstance(name, str) and is_plain(one, depth - 1) for name, one in value.items())


def read_json(source: str | Path, name: str) -> object:
    """Read JSON text, or a file of it.

    Args:
        source: the text (it begins with a brace) or a path.
        name: of what is read, for the text of an error.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not JSON in UTF-8.

    Example::

        >>> read_json('{"version": 1}', "Allocation")
        {'version': 1}
    """
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    where = f"{name} text" if is_text else f"{name} file {Path(source).name!r}"
    try:
        return json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: must be JSON in UTF-8, found other bytes at position {error.start}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: must be JSON, broken at line {error.lineno}, column {error.colno} ({error.msg}); "
            "it may be cut off. Write it again with `allocation.to_json(path)`."
        ) from error
    except (ValueError, RecursionError) as error:  # Python's own limits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where}: must be JSON that can be read, {reason}; {_DAMAGED}") from error
