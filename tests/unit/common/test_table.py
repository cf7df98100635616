"""Tables of plain text."""

import pytest

from lr_callback.common.table import align, shorten

ROWS = [["conv1", "12", "x"], ["layer1.0.conv1", "3", ""]]


def test_columns_are_as_wide_as_their_widest_cell_with_two_blanks_between():
    assert align(["layer", "rank", "kind"], ROWS).splitlines() == [
        "layer           rank  kind",
        "conv1           12    x",
        "layer1.0.conv1  3",
    ]


def test_named_columns_are_aligned_to_the_right():
    assert align(["layer", "rank", "kind"], ROWS, right=frozenset({1, 2})).splitlines() == [
        "layer           rank  kind",
        "conv1             12     x",
        "layer1.0.conv1     3",
    ]


def test_a_table_without_rows_is_its_header():
    assert align(["layer", "rank"], []) == "layer  rank"


def test_no_line_ends_in_blanks():
    assert all(line == line.rstrip() for line in align(["a", "b"], [["long cell", ""], ["", "x"]]).splitlines())


def test_a_row_with_too_many_cells_is_refused():
    with pytest.raises(ValueError, match="zip"):
        align(["a"], [["1", "2"]])


@pytest.mark.parametrize("width", [5, 6, 100])
def test_a_text_that_fits_stays(width):
    assert shorten("conv1", width) == "conv1"


@pytest.mark.parametrize("width", range(4, 24))
def test_a_text_that_is_too_long_gets_exactly_the_width_and_keeps_its_end(width):
    text = "backbone_layer3_22_conv2"
    short = shorten(text, width)
    assert len(short) == width
    assert short.startswith("...") and text.endswith(short.removeprefix("..."))
