"""One line: the same largest error for all layers, lowered until the budget is spent."""

from __future__ import annotations

from chart import Chart
from drawing import Drawing
from example import analysis

from lr_callback.decisions.candidates import Frontier, frontier
from lr_callback.decisions.minimax import minimax

_KEEP = 0.4
_OTHERS = (0.45, 0.16)  # lines that are too high and too low
_COLOURS = ("ca", "cb", "cc")


def draw() -> Drawing:
    """Return the picture."""
    known = analysis()
    edges = {name: frontier(one) for name, one in known.layers.items()}
    dense, budget = known.dense_cost, int(_KEEP * known.dense_cost)
    chosen = minimax(edges, budget)
    answer = max(edges[name].errors[index] for name, index in chosen.items())
    picture = Drawing(760, 372, "The largest error as one line over the curves of three layers, and what it costs")
    picture.text(24, 34, "one line of error over all layers", "title")
    for place, (name, edge) in enumerate(edges.items()):
        _layer(picture, place, name, edge, (_OTHERS[0], answer, _OTHERS[1]))
    picture.text(548, 34, "what each line costs", "title")
    _bars(picture, edges, (_OTHERS[0], answer, _OTHERS[1]), dense)
    return picture


def first_within(edge: Frontier, error: float) -> int:
    """Return the index of the cheapest choice with at most this error."""
    return next(index for index, own in enumerate(edge.errors) if own <= error)


def _layer(picture: Drawing, place: int, name: str, edge: Frontier, lines: tuple[float, ...]) -> None:
    chart = Chart(picture, 46 + place * 164, 296, 124, 216)
    chart.axes("parameters kept", "error" if place == 0 else "", (0.0, 1.0))
    picture.box(chart.x + 30, 72, 10, 10, _COLOURS[place], 2)
    picture.text(chart.x + 46, 82, f"{name} layer", "small")
    dense = edge.costs[-1]
    chart.steps(
        [(cost / dense, error) for cost, error in zip(edge.costs, edge.errors, strict=True)], f"l{'abc'[place]}"
    )
    for index, line in enumerate(lines):
        chart.level(line, "limit" if index == 1 else "limit dashed")
        at = first_within(edge, line)
        picture.dot(*chart.at(edge.costs[at] / dense, edge.errors[at]))


def _bars(picture: Drawing, edges: dict[str, Frontier], lines: tuple[float, ...], dense: int) -> None:
    bottom, scale = 296.0, 216.0 / 0.7
    names = (("too high", "some left"), ("the answer", "just fits"), ("too low", "too dear"))
    for place, line in enumerate(lines):
        left, top = 560 + place * 66, bottom
        for colour, edge in zip(_COLOURS, edges.values(), strict=True):
            height = edge.costs[first_within(edge, line)] / dense * scale
            top -= height
            picture.box(left, top, 38, height - 1, colour)
        picture.text(left + 19, top - 8, f"{line:.2f}", "mark" if place == 1 else "soft", "middle")
        for row, words in enumerate(names[place]):
            picture.text(left + 19, bottom + 17 + row * 15, words, "soft", "middle")
    picture.path([(552, bottom), (740, bottom)], "axis")
    at = bottom - _KEEP * scale
    picture.path([(552, at), (740, at)], "limit dashed")
    picture.text(552, at - 6, "budget", "mark")
