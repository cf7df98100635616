"""Folding: the kernels of a convolution as one matrix, in three of the five ways."""

from __future__ import annotations

import torch
from drawing import Drawing

from lr_callback.mathematics.folding import Geometry, fold

_OUT, _IN, _CELL = 4, 4, 8
_MARKED = (1, 2)  # the kernel that is followed: from input channel 2 to output channel 1


def draw() -> Drawing:
    """Return the picture."""
    picture = Drawing(760, 410, "The kernels of a convolution, folded to a matrix in three ways")
    picture.text(24, 34, "4 x 4 kernels, 3 x 3 each, as a matrix in three ways", "title")
    _weight(picture, 44, 98)
    picture.lines(
        24,
        262,
        ["One shade for each row of a kernel.", "One kernel is marked: it goes from", "input 3 to output 2."],
        "soft",
    )
    picture.arrow((190, 158), (232, 158))
    _folded(
        picture,
        "kernel_in_encoder",
        (256, 98),
        ["rows: outputs; columns: inputs, and all of the kernel", "encoder 3x3, decoder 1x1"],
    )
    _folded(
        picture,
        "height_in_decoder",
        (256, 236),
        ["rows: outputs, and the kernel's height", "columns: inputs, and its width", "encoder 1x3, decoder 3x1"],
    )
    _folded(
        picture,
        "kernel_in_decoder",
        (604, 98),
        ["rows: outputs, all of the kernel", "columns: inputs", "encoder 1x1, decoder 3x3"],
    )
    return picture


def _style(index: int) -> str:
    out, rest = divmod(index, _IN * 9)
    into, place = divmod(rest, 9)
    return f"{'m' if (out, into) == _MARKED else 'h'}{place // 3}"


def _weight(picture: Drawing, x: float, y: float) -> None:
    picture.text(x + 70, y - 8, "inputs", "soft", "middle")
    for out in range(_OUT):
        picture.text(x - 6, y + out * 34 + 16, str(out + 1), "soft", "end")
        for into in range(_IN):
            first = (out * _IN + into) * 9
            styles = [[_style(first + 3 * row + column) for column in range(3)] for row in range(3)]
            picture.cells(x + into * 34, y + out * 34, styles, _CELL)


def _folded(picture: Drawing, folding: str, place: tuple[float, float], words: list[str]) -> None:
    x, y = place
    index = torch.arange(_OUT * _IN * 9).reshape(_OUT, _IN, 3, 3)
    [matrix] = fold(index, folding, 1).tolist()
    rows, columns = Geometry(_OUT, _IN, (3, 3)).matrix_shape(folding, 1)
    picture.text(x, y - 24, folding, "code")
    picture.text(x, y - 8, f"{rows} x {columns}", "soft")
    picture.cells(x, y, [[_style(entry) for entry in row] for row in matrix], _CELL)
    if rows > 20:
        picture.lines(x + columns * _CELL + 10, y + 12, _wrapped(words), "soft", 15)
    elif columns > 20:
        picture.lines(x, y + rows * _CELL + 18, words, "soft", 16)
    else:
        picture.lines(x + columns * _CELL + 14, y + 34, words, "soft", 16)


def _wrapped(words: list[str]) -> list[str]:
    return [part for line in words for part in [*line.replace(", ", ",\n").replace(": ", ":\n").split("\n"), ""]]
