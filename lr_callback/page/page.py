"""Page: the whole document, from facts to one text of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import LATENCY, amount, spoken
from lr_callback.observation.report import UNSTEADY, differing, of_a_batch, spread_of
from lr_callback.page import tables
from lr_callback.page.facts import Facts, Picture
from lr_callback.page.markup import Markup, joined, tag
from lr_callback.page.style import CSS
from lr_callback.page.words import count_of, difference_of, is_noisy, size_of, speed, time_of, value_of, verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do for the page: nothing is fetched, nothing is run, whatever a name in it says."""


def page(facts: Facts) -> str:
    """Return the page.

    Args:
        facts: all that it says.

    Returns:
        A document of HTML with its style and its figures, the same text for the same facts.
    """
    title = f"Low-rank compression: {Path(facts.name).name}"
    parts = [
        tag("header", tag("h1", title), tag("p", facts.name, class_="quiet")),
        tag("dl", *_cards(facts), class_="cards"),
        tag("div", *(tag("p", *_with_code(one)) for one in verdict(facts)), class_="note"),
        *_missing(facts),
        _section("Before and after", tables.compared(facts.stages), *_batch(facts)),
        *([_section("Figures", tag("div", *map(_figure, facts.pictures), class_="figures"))] if facts.pictures else []),
        _section("Layers", tables.layers(facts.allocation)),
        *([_section("Left out", tables.skipped(facts.allocation))] if facts.allocation.skipped else []),
        _section("How it was made", tables.pairs(facts.origin, "How it was made"), *_arguments(facts)),
        _section("How to use it", *_code(facts.loading), *_commands(facts.commands)),
    ]
    return f"<!DOCTYPE html>\n{tag('html', _head(title), tag('body', tag('main', *parts)), lang='en')}\n"


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )


def _section(title: str, *parts: str) -> Markup:
    return tag("section", tag("h2", title), *parts)


def _cards(facts: Facts) -> list[Markup]:
    """Return the numbers that matter most, each after the compression and before, as far as they are known."""
    before, after, allocation = facts.before, facts.after, facts.allocation
    cards = [
        _count("Parameters", before.parameters, after.parameters),
        _count("Multiply-adds of a batch", before.multiply_adds, after.multiply_adds),
        _size("File of the weights", before.file_bytes, after.file_bytes),
        _time(facts),
        _accuracy(facts),
    ]
    if allocation.unit not in ("parameters", "multiply_adds"):
        cards.insert(0, _budget(allocation))
    return [card for card in cards if card is not None]


def _card(title: str, now: str, was: str, change: str, tone: str | None = None) -> Markup:
    told = tag("dd", f"{was} before, " if was else "", tag("span", change, class_=tone), class_="was")
    return tag("div", tag("dt", title), tag("dd", now, class_="now"), told, class_="card")


def _tone(before: float, after: float) -> str | None:
    return None if before == after else "good" if after < before else "bad"


def _budget(allocation: Allocation) -> Markup:
    """Return the cost that the ranks were chosen by, where it is none of the others."""
    unit, before, after = allocation.unit, allocation.dense_cost, allocation.cost
    now, was = (f"{time_of(one / 1e6)} ms" if unit == LATENCY else amount(unit, one) for one in (after, before))
    return _card(spoken(unit).capitalize(), now, was, f"{after / before - 1:+.1%}", _tone(before, after))


def _count(title: str, before: int, after: int) -> Markup | None:
    if not before or not after:
        return None
    change = f"{after / before - 1:+.1%}"
    return _card(title, count_of(after), count_of(before), change, _tone(before, after))


def _size(title: str, before: int, after: int) -> Markup | None:
    if not after:
        return None
    if not before:
        return _card(title, size_of(after), "", "that of the dense network is not known")
    return _card(title, size_of(after), size_of(before), f"{after / before - 1:+.1%}", _tone(before, after))


def _time(facts: Facts) -> Markup | None:
    before, after = facts.before.milliseconds, facts.after.milliseconds
    if not before or not after:
        return None
    tone = {1: "good", -1: "bad", 0: None}[speed(facts)]
    change = UNSTEADY if is_noisy(facts) else f"{after / before - 1:+.1%}"
    return _card("Time of a batch", f"{time_of(after)} ms", f"{time_of(before)} ms", change, tone)


def _accuracy(facts: Facts) -> Markup | None:
    name = facts.accuracy
    if name is None:
        return None
    before, after = facts.before.metrics[name], facts.after.metrics[name]
    tone = "bad" if after < before else None  # a rise is that of the training since
    return _card(name, value_of(name, after), value_of(name, before), difference_of(name, before, after), tone)


def _missing(facts: Facts) -> list[Markup]:
    if not facts.missing:
        return []
    rows = (
        tag("li", tag("strong", f"No {one.what}: "), f"{one.why.rstrip('.')}. To have them: ", *_with_code(one.way))
        for one in facts.missing
    )
    return [_section("What this page lacks", tag("ul", *rows))]


def _batch(facts: Facts) -> list[Markup]:
    if not facts.batch:
        return [tag("p", "Fractions are of the dense network.", class_="quiet")]
    runs = f"; {differing(facts.stages)}" if spread_of(facts.stages) else ""
    batch = of_a_batch(facts.batch)
    told = f"{batch[:1].upper()}{batch[1:]}. Times are of all stages in turns{runs}."
    return [tag("p", f"Fractions are of the dense network. {told}", class_="quiet")]


def _figure(picture: Picture) -> Markup:
    shown = tables.box(Markup(picture.svg), picture.title)
    return tag("figure", tag("h3", picture.title), shown, tag("figcaption", picture.caption))


def _arguments(facts: Facts) -> list[Markup]:
    if not facts.arguments:
        return []
    return [tag("details", tag("summary", "Arguments of the callback"), *_code(facts.arguments))]


def _code(text: str) -> list[Markup]:
    return [tag("pre", tag("code", text), class_="box", tabindex="0", role="region", aria_label="Code")] if text else []


def _commands(commands: Mapping[str, str]) -> list[Markup]:
    return [joined([tag("p", f"{what}:"), *_code(line)]) for what, line in commands.items()]


def _with_code(sentence: str) -> list[str]:
    """Return a sentence with what stands between backquotes as code."""
    return [tag("code", part) if index % 2 else part for index, part in enumerate(sentence.split("`"))]
