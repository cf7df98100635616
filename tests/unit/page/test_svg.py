"""Figures in a page: the same text each time, names of their own, no other file."""

import re
from xml.etree import ElementTree

import pytest

from lr_callback.page.svg import inline_svg

figure_module = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")


def figure(title="a -- <b> & c"):
    made = figure_module.Figure()
    panel = made.subplots()
    panel.plot([1, 2, 3], [3, 1, 2], "o-", label="line")
    panel.legend()
    panel.set_title(title)
    return made


def test_it_is_the_same_text_each_time_without_a_date():
    assert inline_svg(figure(), "one", "x") == inline_svg(figure(), "one", "x")
    assert not re.search(r"\d{4}-\d\d-\d\d", inline_svg(figure(), "one", "x"))


def test_it_is_one_element_that_needs_nothing_else_and_has_no_size_of_its_own():
    text = inline_svg(figure(), "one", 'errors of "a" & <b>')
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == 'errors of "a" & <b>' and root.attrib["role"] == "img"
    assert "viewBox" in root.attrib and not {"width", "height"} & root.attrib.keys()
    assert not re.search(r"<(style|script|metadata|image|text)\b|<!", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}


def test_names_in_two_figures_differ_and_are_found():
    one, two = (inline_svg(figure(), name, "x") for name in ("one", "two"))
    ids = [re.findall(r'\bid="([^"]*)"', text) for text in (one, two)]
    assert not set(ids[0]) & set(ids[1])
    for text, own in zip((one, two), ids, strict=True):
        used = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
        assert used and used <= set(own)


@pytest.mark.parametrize("name", ["", "1", 'a"b', "a b"])
def test_a_name_is_of_letters(name):
    with pytest.raises(ValueError, match="must be of letters, digits and hyphens"):
        inline_svg(figure(), name, "x")
