r"""Printed: the table of an allocation, for any names and any number of layers, in 80 columns of ASCII.

Names come from users' modules, and tables go to whatever there is: a terminal without Unicode, a log file, a job's
output. What is not printable ASCII is written as Python would (``\xf6``), so that the text can be printed anywhere and
every character is one column wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from lr_callback.common.table import WIDTH, align, listed, printable, readable, shorten, wrap
from lr_callback.decisions.factorization import Factorization

MOST_ROWS, MOST_NAMES, MOST_REASONS = 60, 6, 12
"""Rows of a table, names on a line, and lines of reasons; of more, the text says how many there are."""

_LONGEST_SHAPE, _LONGEST_LISTED = 20, 40

FOLDED = {
    "kernel_in_encoder": "encoder",
    "depth_in_decoder": "decoder d",
    "height_in_decoder": "decoder h",
    "width_in_decoder": "decoder w",
    "kernel_in_decoder": "decoder",
}
"""Folding -> what a table says of it: the axes of the kernel that the decoder gets."""

Layers = Mapping[str, Factorization | None]
"""Layer name -> what it becomes; None: it stays dense."""


def table_of(layers: Layers, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return one row for each layer; of many those of the largest, in the model's order, and how many are left out.

    Args:
        layers: of an allocation.
        shapes: layer name -> shape of its dense weight.

    Example::

        >>> print(table_of({"stem": None}, {"stem": (8, 3, 1, 1)}))
        layer  shape    folding  slices  rank  error    kept
        stem   8x3x1x1  dense                         100.0%
    """
    header = ["layer", "shape", "folding", "slices", "rank", "error", "kept"]
    shown = _shown(layers, shapes)
    rows = [_row(name, shapes[name], layers[name]) for name in shown]
    others = sum(2 + max(len(row[column]) for row in [header, *rows]) for column in range(1, len(header)))
    rows = [[shorten(row[0], max(4, WIDTH - others)), *row[1:]] for row in rows]
    left = [layers[name] for name in layers.keys() - set(shown)]
    return align(header, rows, right=frozenset({3, 4, 5, 6})) + _left_out(left)


def _shown(layers: Layers, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of the layers that get a row: the largest, and the one that errs most."""
    if len(layers) <= MOST_ROWS:
        return list(layers)
    worst = max(layers, key=lambda name: _error(layers[name]))
    chosen = set(sorted(layers, key=lambda name: (name != worst, -prod(shapes[name])))[:MOST_ROWS])
    return [name for name in layers if name in chosen]


def _error(layer: Factorization | None) -> float:
    return 0.0 if layer is None else layer.relative_error


def _row(name: str, shape: Sequence[int], layer: Factorization | None) -> list[str]:
    sizes = shorten("x".join(map(str, shape)), _LONGEST_SHAPE)
    if layer is None:
        return [printable(readable(name)), sizes, "dense", "", "", "", "100.0%"]
    kept = "-" if layer.kept is None else f"{layer.kept:.1%}"
    ranks = [str(layer.num_slices), str(layer.rank), f"{layer.relative_error:.3f}"]
    return [printable(readable(name)), sizes, FOLDED[layer.folding], *ranks, kept]


def _left_out(left: Sequence[Factorization | None]) -> str:
    if not left:
        return ""
    dense = left.count(None)
    text = (
        f"... and {len(left):,} more layers (the largest are shown): {len(left) - dense:,} factorized, "
        f"{dense:,} dense; `to_json()` of the allocation has them all"
    )
    return f"\n{wrap(text)}"


def reasons_of(label: str, reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, the names that share it before it; of many how many there are.

    Args:
        label: begins each line.
        reasons: layer name -> why.

    Example::

        >>> reasons_of("skipped", {"a": "too small", "b": "too small", "c": "frozen"})
        ['skipped a, b: too small', 'skipped c: frozen']
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    most = MOST_REASONS if len(groups) > MOST_REASONS + 1 else len(groups)
    lines = [f"{label} {_named(names)}: {printable(reason)}" for reason, names in list(groups.items())[:most]]
    left = list(groups.values())[most:]
    if left:
        lines.append(
            f"{label} {sum(map(len, left)):,} more layers, for {len(left):,} other reasons; `to_json()` of the "
            "allocation has them all"
        )
    return [wrap(line) for line in lines]


def _named(names: Iterable[str]) -> str:
    shown = [shorten(printable(readable(name)) or "(the model)", _LONGEST_LISTED) for name in names]
    some = listed(shown, MOST_NAMES)
    return some if len(shown) <= MOST_NAMES else f"{len(shown):,} layers ({some})"
