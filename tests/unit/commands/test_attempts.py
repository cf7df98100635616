"""What a page goes without: noted once for a reason, or raised where a user has named what is refused."""

import sys
from functools import partial

import pytest

from lr_callback.commands.attempts import Attempts
from lr_callback.commands.from_checkpoint import device_named
from lr_callback.page.facts import Missing

refused = partial(device_named, "nowhere")
LINE = ["--model", "my.Model", "--model.width", "3", "--data=my.Data", "--device", "cpu"]


def own():
    raise KeyError("labels")


def test_words_are_those_of_an_argument_and_what_is_in_it():
    attempts = Attempts(LINE)
    assert attempts.words("--model", "--device") == ["--model", "my.Model", "--model.width", "3", "--device", "cpu"]
    assert attempts.words_without("--model", "--device") == ["--data=my.Data"]
    assert attempts.words_without() == LINE
    assert attempts.are_asked("--data") and not attempts.are_asked("--config")


def test_what_can_be_had_is_returned_and_nothing_noted():
    attempts = Attempts([])
    assert attempts.make("sum", "", lambda: 3) == 3
    assert attempts.missing == []


def test_a_refusal_is_raised_where_it_was_asked_and_else_noted():
    with pytest.raises(ValueError, match="--device must be one that is here"):
        Attempts(LINE).make("times", "name another", refused, "--device")
    attempts = Attempts(LINE)
    assert attempts.make("times", "name another", refused, "--config") is None
    [missing] = attempts.missing
    assert (missing.what, missing.way) == ("times", "name another")
    assert missing.why.startswith("--device must be one that is here, as cpu or cuda, got nowhere: ")


def test_an_error_of_own_code_is_noted_with_its_place_also_where_it_was_asked():
    attempts = Attempts(LINE)
    attempts.make("times", "name another", own, "--device")
    [missing] = attempts.missing
    place = f"test_attempts.py, line {own.__code__.co_firstlineno + 1}, in own)"
    assert missing.why.startswith("KeyError: 'labels' (") and missing.why.endswith(place)
    assert missing.way == "mend that, and make the page again"


def test_a_reason_is_said_once():
    attempts = Attempts([])
    for what, way in (("metrics", "one"), ("times", "other"), ("figures", "one")):
        attempts.note(Missing(what, "it is so", way))
    attempts.note(Missing("more", "it is otherwise", "one"))
    assert list(map(str, attempts.missing)) == [
        "without metrics, times, figures: it is so. To have them: one; or other",
        "without more: it is otherwise. To have them: one",
    ]
    assert attempts.lack("more") and not attempts.lack("times")


def ends():
    sys.exit("no arguments")


def test_own_code_that_ends_the_process_costs_what_it_was_run_for():
    attempts = Attempts([])
    assert attempts.make("times", "name another", ends) is None
    assert attempts.missing[0].why.startswith("SystemExit: no arguments (")
