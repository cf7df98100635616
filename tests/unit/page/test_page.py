"""The whole document: one text, whatever is known, and nothing that a browser would fetch or run."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from lr_callback.page.facts import Missing, Picture
from lr_callback.page.markup import Markup
from lr_callback.page.page import page

EMPTY = {"meta", "br"}


class Checked(HTMLParser):
    """Elements end in the order in which they begin; their names, ids and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.ids, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += attributes
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in EMPTY:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


def everything(facts):
    return replace(
        facts,
        allocation=replace(facts.allocation, skipped={"drop": "no weight"}),
        origin={"method": "ALDS(error='slice')"},
        arguments="keep_ratio: 0.5\n",
        loading="import lr_callback as lrc",
        commands={"A file": "lr-callback export"},
        pictures=(Picture("Ranks", "How many.", Markup('<svg viewBox="0 0 1 1"></svg>')),),
        missing=(Missing("accuracies", "there is no data", "--data my.Data"),),
    )


def test_all_sections_of_a_page(facts):
    text = page(everything(facts))
    assert headings(text) == [
        "What this page lacks", "Before and after", "Figures", "Layers", "Left out", "How it was made", "How to use it",
    ]  # fmt: skip
    names = Checked(text).names
    assert names.count("h1") == names.count("title") == names.count("main") == 1
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">') and '<meta charset="utf-8">' in text
    assert page(everything(facts)) == text


def test_sections_of_what_is_not_known_are_left_out(facts):
    assert headings(page(facts)) == ["Before and after", "Layers", "How it was made", "How to use it"]


def test_numbers_that_matter_stand_first_with_their_change(facts):
    cards = re.findall(r"<dt>(.*?)</dt><dd class=\"now\">(.*?)</dd><dd class=\"was\">(.*?)</dd>", page(facts))
    assert [(title, now) for title, now, _ in cards] == [
        ("Parameters", "140"),
        ("Multiply-adds of a batch", "2,000"),
        ("File of the weights", "6.0 kB"),
        ("Time of a batch", "3.00 ms"),
        ("val_accuracy", "88.00%"),
    ]
    changes = [re.sub("<.*?>", "", was) for _, _, was in cards]
    assert changes[0] == "200 before, -30.0%" and changes[3] == "2.00 ms before, +50.0%"
    assert 'class="bad">+50.0%' in cards[3][2] and 'class="bad">-2.00 points' in cards[4][2]


def test_another_unit_of_the_budget_has_a_number_of_its_own(facts):
    found = page(replace(facts, allocation=replace(facts.allocation, unit="bytes")))
    assert '<dt>Bytes</dt><dd class="now">140 bytes</dd><dd class="was">200 bytes before, ' in found
    assert "<dt>Multiply-adds</dt>" not in page(
        replace(facts, allocation=replace(facts.allocation, unit="multiply_adds"))
    )


def test_a_budget_in_time_is_told_in_milliseconds_as_a_batch_is(facts):
    timed = replace(facts.allocation, unit="latency", cost=577_123, dense_cost=653_000)
    card = page(replace(facts, allocation=timed)).partition("<dt>Latency")[2].partition("</div>")[0]
    assert ">0.577 ms<" in card and ">0.653 ms before, " in card and "-11.6%" in card


def test_nothing_is_fetched_or_run_whatever_a_name_says(facts, allocated):
    evil = "\"><script src='https://example.org/x.js'></script><img src=x onerror=alert(1)>"
    told = everything(facts)
    told = replace(
        told,
        name=evil,
        allocation=replace(allocated(3, prefix=evil), skipped={evil: evil}, error=evil),
        stages=tuple(replace(stage, name=evil, metrics={evil + "acc": 0.5}) for stage in told.stages),
        batch=evil, arguments=evil, loading=evil, origin={evil: evil}, commands={evil: evil},
        missing=(Missing(evil, evil, evil),),
    )  # fmt: skip
    text = page(told)
    checked = Checked(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(checked.names)
    assert not [key for key, value in checked.attributes if key == "src" or key.startswith("on")]
    assert all(value.startswith("#") for key, value in checked.attributes if key.endswith("href"))
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src &#x27;none&#x27;" in text
