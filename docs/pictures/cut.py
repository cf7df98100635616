"""A cut in a running Trainer: when it comes, what is done, and what is taken back if anything fails."""

from __future__ import annotations

from drawing import Drawing

_EPOCHS = 5
_STEPS = (
    ("measure", "some batches of", "the run's training"),
    ("choose", "slices and ranks,", "one budget"),
    ("build", "factors beside", "the model, refitted"),
    ("replace", "layers in place;", "optimizers follow"),
    ("tell", "log, snapshot,", "table"),
)


def draw() -> Drawing:
    """Return the picture."""
    picture = Drawing(
        760, 478, "A compression at the start of an epoch, its steps, and the optimizer before and after it"
    )
    picture.text(24, 34, "at the start of a chosen epoch", "title")
    _timeline(picture, 40, 56)
    _steps(picture, 40, 158)
    picture.text(24, 300, "the optimizer's group, before and after", "title")
    _groups(picture, 40, 318)
    return picture


def _timeline(picture: Drawing, x: float, y: float) -> None:
    for epoch in range(_EPOCHS):
        left = x + epoch * 138
        small = epoch >= 2
        picture.box(left, y, 78, 30, "decoder" if small else "encoder", 3)
        picture.text(left + 39, y + 19, f"train {epoch}", "small", "middle")
        picture.box(left + 81, y, 50, 30, "panel", 3)
        picture.text(left + 106, y + 19, "val, file", "soft", "middle")
    middle = x + 2 * 138 - 4
    picture.path([(middle, y - 8), (middle, y + 46)], "limit")
    picture.text(middle, y + 62, "the cut, at the start of epoch 2", "mark", "middle")
    picture.text(x + 39, y + 46, "dense", "soft", "middle")
    picture.text(x + 3 * 138 + 39, y + 46, "factorized", "soft", "middle")


def _steps(picture: Drawing, x: float, y: float) -> None:
    for place, (name, *words) in enumerate(_STEPS):
        left = x + place * 138
        picture.box(left, y, 118, 66, "panel", 5)
        picture.text(left + 59, y + 20, name, anchor="middle")
        for row, line in enumerate(words):
            picture.text(left + 59, y + 39 + row * 15, line, "soft", "middle")
        if place:
            picture.arrow((left - 18, y + 33), (left - 2, y + 33))
    picture.path([(x, y + 78), (x, y + 86), (x + 670, y + 86), (x + 670, y + 78)], "limit")
    picture.text(x + 335, y + 103, "whatever is raised up to here takes all back", "mark", "middle")


def _groups(picture: Drawing, x: float, y: float) -> None:
    before = [
        ("conv1.weight", "panel", 120),
        ("conv2.weight", "encoder", 236),
        ("conv2.bias", "panel", 120),
        ("fc.weight", "panel", 120),
    ]
    after = [
        ("conv1.weight", "panel", 120),
        ("encoder.weight", "encoder", 116),
        ("decoder.weight", "decoder", 116),
        ("decoder.bias", "panel", 120),
        ("fc.weight", "panel", 120),
    ]
    for row, (line, parts) in enumerate((("before", before), ("after", after))):
        top, left = y + row * 76, x
        picture.text(left, top + 12, line, "soft")
        for name, style, width in parts:
            picture.box(left, top + 18, width, 30, style, 3)
            picture.text(left + width / 2, top + 37, name, "code", "middle")
            left += width + 4
    for left, words in (
        (x + 60, "keeps its state"),
        (x + 242, "new, without state"),
        (x + 424, "the same tensor"),
        (x + 548, "keeps its state"),
    ):
        picture.text(left, y + 140, words, "soft", "middle")
