"""Every text is escaped, wherever it stands; what has been made is not escaped again."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from lr_callback.page.markup import Markup, escaped, joined, tag


class Parsed(HTMLParser):
    """What a parser of HTML finds."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append(name)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@given(st.text(), st.text())
def test_any_text_and_any_value_come_back_as_text_and_value(text, value):
    found = Parsed(tag("p", text, title=value))
    shown = [
        "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in given)
        for given in (text, value)
    ]
    assert (found.elements, found.text, found.attributes) == (["p"], shown[0], [("title", shown[1])])
    found_text = tag("p", text)
    assert found_text.encode("utf-8")


def test_markup_is_not_escaped_again_and_text_beside_it_is():
    assert joined([tag("b", "1 < 2"), " & ", Markup("<br>")]) == "<b>1 &lt; 2</b> &amp; <br>"


def test_names_of_attributes():
    assert tag("p", "", class_="a", aria_label="b", title=None) == '<p class="a" aria-label="b"></p>'


def test_what_would_turn_the_direction_of_text_is_marked():
    assert escaped("a\u202eb\ud800") == "a\ufffdb\ufffd"
