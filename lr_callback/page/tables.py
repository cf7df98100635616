"""Tables: stages side by side, the layers, what was skipped, names and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lr_callback.common.table import readable
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import LATENCY, spoken
from lr_callback.decisions.factorization import Factorization
from lr_callback.decisions.printed import FOLDED
from lr_callback.observation.report import Stage
from lr_callback.page.markup import Markup, joined, tag
from lr_callback.page.words import time_of, value_of

MOST_LAYERS = 500
"""Rows of the table of layers; more make a page of megabytes that nobody reads."""
_MOST_NAMES = 30
_NONE = "\N{EN DASH}"
_LAYERS = ("layer", "shape", "folding", "slices", "rank", "error", "cost", "dense cost", "kept")
_COUNTS: Mapping[str, tuple[Callable[[Stage], float], Callable[[float], str]]] = {
    "parameters": (lambda stage: stage.parameters, "{:,}".format),
    "multiply-adds of a batch": (lambda stage: stage.multiply_adds, "{:,}".format),
    "bytes of a file of the weights": (lambda stage: stage.file_bytes, "{:,}".format),
    "milliseconds of a batch": (lambda stage: stage.milliseconds, time_of),
}


def box(table: str, label: str, tall: bool = False) -> Markup:
    """Return what is wide, or high, in a box of its own that scrolls, by keys, too."""
    return tag("div", table, class_="box tall" if tall else "box", tabindex="0", role="region", aria_label=label)


def compared(stages: Sequence[Stage]) -> Markup:
    """Return the stages side by side, each count also as a fraction of the first stage's; unknown rows left out.

    Args:
        stages: the first one is that before the compression.
    """
    names = dict.fromkeys(name for stage in stages for name in stage.metrics)
    rows = [
        [name, *(value_of(name, stage.metrics[name]) if name in stage.metrics else _NONE for stage in stages)]
        for name in names
    ]
    for title, (count, told) in _COUNTS.items():
        values = [count(stage) for stage in stages]
        if any(values):
            rows.append([title, *_counted(values, told)])
    return box(_compared(["", *(stage.name for stage in stages)], rows), "Stages side by side")


def _counted(values: Sequence[float], told: Callable[[float], str]) -> list[str]:
    base = values[0]
    cells = [told(value) if value else _NONE for value in values]
    parts = ["", *(f" ({value / base:.1%})" if base and value else "" for value in values[1:])]
    return [cell + part for cell, part in zip(cells, parts, strict=True)]


def layers(allocation: Allocation) -> Markup:
    """Return the table of the layers, at most :data:`MOST_LAYERS` of them: those with the largest weights."""
    shown = _largest(allocation)
    told_unit = "nanoseconds" if allocation.unit == LATENCY else spoken(allocation.unit)
    note = f"Errors are those of the measure “{allocation.error}”, costs are in {told_unit}."
    if len(shown) < len(allocation.layers):
        note += (
            f" {len(shown):,} of {len(allocation.layers):,} layers are shown, those with the largest weights; all are "
            "in the checkpoint's allocation."
        )
    head = tag("thead", tag("tr", *(_column(title, index < 3) for index, title in enumerate(_LAYERS))))
    body = tag("tbody", *(_layer(name, allocation.shapes[name], allocation.layers[name]) for name in shown))
    return joined([tag("p", note, class_="quiet"), box(tag("table", head, body), "Layers", tall=True)])


def _largest(allocation: Allocation) -> list[str]:
    """Return the names of the layers that are shown, in the order of the network."""

    def size(name: str) -> int:
        total = 1
        for axis in allocation.shapes[name]:
            total *= axis
        return total

    names = sorted(allocation.layers, key=size, reverse=True)[:MOST_LAYERS]
    kept = set(names)
    return [name for name in allocation.layers if name in kept]


def _layer(name: str, shape: Sequence[int], layer: Factorization | None) -> Markup:
    head = tag("th", readable(name), scope="row")
    sizes = tag("td", "x".join(map(str, shape)), class_="text")
    if layer is None:
        rest = [tag("td", _NONE) for _ in range(5)]
        return tag("tr", head, sizes, tag("td", "dense", class_="text"), *rest, _part(1.0, "100.0%"), class_="dense")
    kept = tag("td", _NONE) if layer.kept is None else _part(layer.kept, f"{layer.kept:.1%}")
    return tag(
        "tr",
        head,
        sizes,
        tag("td", FOLDED[layer.folding], class_="text"),
        tag("td", str(layer.num_slices)),
        tag("td", str(layer.rank)),
        _part(layer.relative_error, f"{layer.relative_error:.3f}"),
        tag("td", f"{layer.cost:,}"),
        tag("td", f"{layer.dense_cost:,}"),
        kept,
    )


def _part(value: float, text: str) -> Markup:
    """Return a number with a bar behind it, from 0 to 1."""
    return tag("td", text, class_="bar", style=f"--part:{min(1.0, max(0.0, value)):.3f}")


def skipped(allocation: Allocation) -> Markup:
    """Return the layers that were left out, by reason; of many with one reason the first."""
    reasons: dict[str, list[str]] = {}
    for name, reason in allocation.skipped.items():
        reasons.setdefault(reason, []).append(readable(name))
    return tag("ul", *(tag("li", *_names(names), f": {reason}") for reason, names in reasons.items()))


def _names(names: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for name in names[:_MOST_NAMES]:
        parts += [", ", tag("code", name or "the model itself")]
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return [*parts[1:], more]


def pairs(values: Mapping[str, str], label: str) -> Markup:
    """Return names and values as a table of two columns."""
    rows = joined(tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in values.items())
    return box(tag("table", tag("tbody", rows), class_="plain"), label)


def _compared(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return a table of stages; each cell knows its stage, which it says itself where there is no room for columns."""
    head = tag("thead", tag("tr", *(_column(title, not index) for index, title in enumerate(header))))
    body = (tag("tr", tag("th", name, scope="row"), *map(_told, cells, header[1:])) for name, *cells in rows)
    return tag("table", head, tag("tbody", *body), class_="stages")


def _told(cell: str, stage: str) -> Markup:
    return tag("td", cell, data_stage=stage)


def _column(title: str, is_text: bool) -> Markup:
    return tag("th", title, scope="col", class_="text" if is_text else None) if title else tag("td")
