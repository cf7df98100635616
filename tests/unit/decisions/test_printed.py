"""The table of an allocation: 80 columns of ASCII for any names and shapes, cut with a note for many layers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr_callback.common.table import WIDTH
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.factorization import Factorization
from lr_callback.decisions.printed import MOST_NAMES, MOST_REASONS, MOST_ROWS, reasons_of, table_of

CONV = Factorization("height_in_decoder", 4, 3, 0.25, 300, 1000)


def allocation(layers, shapes, skipped=None, **changes):
    return Allocation(layers, skipped or {}, shapes, 1200, 2000, 1250, 0.625, **changes)


def test_long_names_are_shortened_so_that_layers_stay_apart_in_80_columns():
    names = [f"backbone.encoder.stages.{stage}.blocks.{block}.conv2" for stage in range(4) for block in range(9)]
    layers, shapes = dict.fromkeys(names, CONV), dict.fromkeys(names, (2048, 2048, 3, 3))
    lines = str(allocation(layers, shapes, dict.fromkeys(names, "a reason"))).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len({line.split()[0] for line in lines[1:37]}) == 36


FORMS = st.none() | st.builds(
    Factorization,
    st.sampled_from(["kernel_in_encoder", "width_in_decoder"]),
    st.integers(1, 10**5),
    st.integers(1, 10**6),
    st.floats(0, 999),
    st.integers(1, 10**9),
    st.just(10**9),
)
NAMES = st.text(max_size=90)
"""Of any characters: brackets, line breaks, escapes, halves of surrogate pairs."""


@given(
    layers=st.dictionaries(NAMES, FORMS, max_size=8),
    skipped=st.dictionaries(NAMES, NAMES, max_size=8),
    shape=st.lists(st.integers(1, 10**5), min_size=2, max_size=5),
    unit=NAMES,
)
def test_every_line_is_printable_ascii_of_at_most_80_columns(layers, skipped, shape, unit):
    found = allocation(layers, dict.fromkeys(layers, tuple(shape)), skipped, unit=f"own.{unit}")
    for line in str(found).split("\n"):
        assert len(line) <= WIDTH
        assert re.fullmatch("[ -~]*", line)


def test_markup_and_control_characters_are_shown_as_text():
    layers = {"[bold]x[/x]": None, "a\n\x1b[2Jb": None, "gr\xf6\xdfe": None}
    rows = table_of(layers, dict.fromkeys(layers, (2, 2))).split("\n")[1:]
    assert [row.split()[0] for row in rows] == ["[bold]x[/x]", "a\\n\\x1b[2Jb", "gr\\xf6\\xdfe"]


def many(count):
    """Return layers of which each fourth is dense; the later ones are the larger, and the first errs most."""
    layers = {f"layers.{index}": None if index % 4 else CONV for index in range(count)}
    if layers:
        layers["layers.0"] = Factorization("kernel_in_encoder", 1, 2, 0.75, 1, 2)
    return layers, {name: (index + 1, 8) for index, name in enumerate(layers)}


def test_ten_thousand_layers_are_cut_to_the_largest_and_the_worst_in_order_with_a_note():
    layers, shapes = many(10_000)
    shown = str(allocation(layers, shapes, dict.fromkeys(layers, "too small")))
    lines = shown.splitlines()
    assert len(lines) < MOST_ROWS + 10 and max(map(len, lines)) <= WIDTH
    names = [line.split()[0] for line in lines[1 : MOST_ROWS + 1]]
    assert names == ["layers.0", *(f"layers.{index}" for index in range(10_001 - MOST_ROWS, 10_000))]
    told = " ".join(shown.split())
    assert "... and 9,940 more layers (the largest are shown): 2,485 factorized, 7,455 dense; `to_json()` of" in told
    assert "skipped 10,000 layers (layers.0, layers.1, " in told


@pytest.mark.parametrize("count", [0, 1, MOST_ROWS])
def test_so_many_layers_all_have_a_row_and_there_is_no_note(count):
    shown = table_of(*many(count))
    assert len(shown.splitlines()) == 1 + count and "..." not in shown


def test_names_of_one_reason_are_counted_where_they_are_many():
    assert reasons_of("skipped", dict.fromkeys("abcdef", "why")) == ["skipped a, b, c, d, e, f: why"]
    assert MOST_NAMES == 6
    assert reasons_of("skipped", dict.fromkeys("abcdefg", "why")) == ["skipped 7 layers (a, b, c, d, e, f, ...): why"]


def test_reasons_are_counted_where_they_are_many():
    lines = reasons_of("skipped", {f"layer{index}": f"because of {index}" for index in range(1000)})
    assert lines[0] == "skipped layer0: because of 0"
    assert " ".join(lines[-1].split()).startswith(f"skipped {1000 - MOST_REASONS} more layers, for 988 other reasons;")
    assert len(lines) == MOST_REASONS + 1


def test_the_model_itself_has_a_name_too():
    assert reasons_of("skipped", {"": "frozen"}) == ["skipped (the model): frozen"]
