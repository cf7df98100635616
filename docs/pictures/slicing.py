"""Slicing: the input channels in parts, each with a decomposition of its own."""

from __future__ import annotations

from drawing import Drawing

_COLOURS = ("ca", "cb", "cc", "cd")
_WIDE, _HIGH, _RANK = 44.0, 72.0, 12.0  # of the picture of a slice, and of the rank that it keeps


def draw() -> Drawing:
    """Return the picture."""
    picture = Drawing(
        760, 470, "A folded weight in four slices, each cut off by itself, and the two layers that they make"
    )
    picture.text(24, 34, "as matrices: k = 4 slices of the input channels, rank j in each", "title")
    _matrices(picture, 44, 92)
    picture.text(24, 236, "as layers: an encoder with groups, and a decoder over all", "title")
    _layers(picture, 44, 262)
    return picture


def _matrices(picture: Drawing, x: float, y: float) -> None:
    picture.text(x - 8, y + _HIGH / 2 + 4, "F", "soft", "end")
    picture.text(x, y - 10, "C · E: the inputs, with the kernel", "soft")
    for index, colour in enumerate(_COLOURS):
        left = x + index * (_WIDE + 2)
        picture.box(left, y, _WIDE, _HIGH, colour)
        picture.text(left + _WIDE / 2, y + _HIGH + 18, f"W{'₁₂₃₄'[index]}", anchor="middle")
    picture.text(x + 4 * _WIDE + 26, y + _HIGH / 2 + 6, "≈", "title", "middle")
    for index, colour in enumerate(_COLOURS):
        left = x + 4 * _WIDE + 52 + index * (_WIDE + _RANK + 24)
        _product(picture, left, y, colour, index)
    picture.lines(
        x + 4 * _WIDE + 52 + 4 * (_WIDE + _RANK + 24) + 2,
        y + 10,
        ["Uᵢ: F x j", "Vᵢ: j x C/k · E", "", "the j largest", "singular values"],
        "soft",
    )


def _product(picture: Drawing, x: float, y: float, colour: str, index: int) -> None:
    picture.box(x, y, _RANK, _HIGH, colour)
    picture.box(x + _RANK + 4, y, _WIDE, _RANK, colour)
    picture.text(x + 2, y + _HIGH + 18, f"U{'₁₂₃₄'[index]}")
    picture.text(x + _RANK + 4 + _WIDE / 2, y + _RANK + 18, f"V{'₁₂₃₄'[index]}", anchor="middle")


def _layers(picture: Drawing, x: float, y: float) -> None:
    step, high = 42.0, 34.0
    for index, colour in enumerate(_COLOURS):
        top = y + index * step
        for channel in range(4):
            picture.box(x, top + channel * 9, 46, 7, colour, 1)
        picture.arrow((x + 54, top + high / 2), (x + 106, top + high / 2))
        picture.box(x + 110, top, 96, high, "encoder", 4)
        picture.text(x + 158, top + high / 2 + 5, f"V{'₁₂₃₄'[index]}", anchor="middle")
        picture.arrow((x + 210, top + high / 2), (x + 262, top + high / 2))
        for channel in range(2):
            picture.box(x + 270, top + 9 + channel * 9, 46, 7, colour, 1)
        picture.arrow((x + 324, top + high / 2), (x + 376, top + high / 2))
    bottom = 3 * step + high
    picture.box(x + 380, y, 150, bottom, "decoder", 4)
    for index, colour in enumerate(_COLOURS):
        left = x + 403 + index * 28
        picture.box(left, y + 22, 20, 86, colour)
        picture.text(left + 10, y + 126, f"U{'₁₂₃₄'[index]}", anchor="middle")
    picture.text(x + 455, y + 147, "and the bias", "small", "middle")
    picture.arrow((x + 534, y + bottom / 2), (x + 586, y + bottom / 2))
    for channel in range(12):
        picture.box(x + 594, y + 4 + channel * 13, 46, 8, "h1", 1)
    for left, words in (
        (x + 23, "C inputs"),
        (x + 158, "encoder, groups = k"),
        (x + 293, "k · j channels"),
        (x + 455, "decoder"),
        (x + 617, "F outputs"),
    ):
        picture.text(left, y + bottom + 24, words, "soft", "middle")
