"""Tables: every column, cut where nobody would read on, and escaped."""

import re
from dataclasses import replace

from lr_callback.page import tables


def rows_of(markup):
    """Return the cells of each row as text."""
    rows = re.findall(r"<tr.*?</tr>", markup, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_layers_with_all_columns(allocated):
    header, first, last = rows_of(tables.layers(allocated()))
    assert header == ["layer", "shape", "folding", "slices", "rank", "error", "cost", "dense cost", "kept"]
    assert first == ["layer0", "8x4x3x3", "encoder", "2", "3", "0.250", "40", "100", "40.0%"]
    assert last == ["layer1", "8x5x3x3", "dense", *["\N{EN DASH}"] * 5, "100.0%"]


def test_of_ten_thousand_layers_the_largest_are_shown_in_their_order_and_the_page_says_so(allocated):
    markup = tables.layers(allocated(10_000))
    names = [row[0] for row in rows_of(markup)[1:]]
    assert names == [f"layer{index}" for index in range(10_000 - tables.MOST_LAYERS, 10_000)]
    assert "500 of 10,000 layers are shown, those with the largest weights" in markup
    assert len(markup) < 500_000
    assert "are shown" not in tables.layers(allocated(500))


def test_names_that_contain_markup_are_text(allocated):
    name = "<script>alert(1)</script>&\"'"
    markup = tables.layers(allocated(2, prefix=name))
    assert "<script" not in markup and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;0" in markup
    left = replace(allocated(), skipped={name: "a <b> & c", "": "it"})
    found = tables.skipped(left)
    assert "<script" not in found and "<b>" not in found and "the model itself" in found


def test_what_was_skipped_stands_by_reason_and_many_names_are_cut(allocated):
    skipped = {**{f"drop{index:02}": "no weight" for index in range(40)}, "gru": "GRU is not among them"}
    found = tables.skipped(replace(allocated(), skipped=skipped))
    first, second = re.findall(r"<li>(.*?)</li>", found)
    assert first.endswith("<code>drop29</code> and 10 more: no weight") and first.count("<code>") == 30
    assert second == "<code>gru</code>: GRU is not among them"


def test_stages_side_by_side_without_what_nobody_measured(facts):
    header, *rows = rows_of(tables.compared(facts.stages))
    assert header == ["", "dense, before", "this checkpoint"]
    assert rows == [
        ["val_accuracy", "90.00%", "88.00%"],
        ["val_loss", "0.5", "0.7"],
        ["parameters", "200", "140 (70.0%)"],
        ["multiply-adds of a batch", "4,000", "2,000 (50.0%)"],
        ["bytes of a file of the weights", "10,000", "6,000 (60.0%)"],
        ["milliseconds of a batch", "2.00", "3.00 (150.0%)"],
    ]
    bare = [replace(stage, metrics={}, milliseconds=0.0, multiply_adds=0) for stage in facts.stages]
    bare[0] = replace(bare[0], file_bytes=0)
    assert [row[0] for row in rows_of(tables.compared(bare))[1:]] == ["parameters", "bytes of a file of the weights"]
    assert rows_of(tables.compared(bare))[-1][1:] == ["\N{EN DASH}", "6,000"]


def test_each_cell_knows_its_stage_for_where_there_are_no_columns(facts):
    markup = tables.compared(facts.stages)
    assert re.findall(r'data-stage="([^"]*)"', markup) == ["dense, before", "this checkpoint"] * 6


def test_headers_say_what_they_are_of(facts):
    markup = tables.compared(facts.stages)
    assert markup.count('scope="col"') == 2 and markup.count('scope="row"') == 6
    assert 'tabindex="0"' in markup and 'role="region"' in markup
