"""What a person sees: texts above the Trainer's bar, which end nothing, and stages side by side."""

import io
import math
import sys
from dataclasses import replace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lr_callback.common.table import WIDTH
from lr_callback.observation.report import (
    Stage,
    are_unsteady,
    attempt,
    comparison,
    encodable,
    is_disabled,
    show,
    spread_of,
    write,
)

DENSE = Stage("dense", {"accuracy": 0.91, "loss": 0.25}, 20_000, 4_000_000, 81_920, 2.0)
CUT = Stage("after the cut", {"accuracy": 0.7, "loss": 1.125}, 5_000, 1_000_000, 24_576, 3.0)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_bars_say_themselves_whether_they_are_disabled(bar):
    pytest.importorskip("rich")
    shown = bar()
    assert not is_disabled(shown)
    shown.disable()
    assert is_disabled(shown)


def test_bar_that_says_nothing_is_taken_to_show_itself():
    assert not is_disabled(object())


class Own(ProgressBar):
    """A bar of a user, which prints in its own way, or cannot."""

    def __init__(self, error=None):
        super().__init__()
        self.texts, self.error = [], error

    def disable(self):
        pass

    def print(self, text):
        if self.error is not None:
            raise self.error
        self.texts.append(text)


def trainer(*bars):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(callbacks=list(bars), enable_progress_bar=bool(bars), **settings)


def test_a_text_goes_above_the_bar_of_a_user_in_its_own_way():
    bar = Own()
    show(trainer(bar), "a table")
    assert bar.texts == ["a table"]


def test_a_text_is_seen_before_a_bar_of_tqdm_has_a_line(capsys):
    show(trainer(TQDMProgressBar()), "a table")
    assert capsys.readouterr().out == "a table\n"


def test_a_text_is_seen_before_a_bar_of_rich_has_started(capsys):
    pytest.importorskip("rich")
    show(trainer(RichProgressBar()), "[bold]a table[/x] :smile:")
    assert capsys.readouterr().out == "[bold]a table[/x] :smile:\n"


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), ValueError("I/O operation on closed file")])
def test_a_text_that_cannot_be_printed_is_said_and_ends_nothing(error):
    with pytest.warns(UserWarning, match=rf"could not be shown \({type(error).__name__}: .* training go on, and"):
        show(trainer(Own(error)), "a table")


def test_it_is_said_once():
    with pytest.warns(UserWarning) as said:  # which looks at every warning; a program shows a text once:
        for _ in range(3):
            show(trainer(Own(BrokenPipeError("gone"))), "a table")
    assert len({(str(one.message), one.filename, one.lineno) for one in said}) == 1


def test_an_interrupt_while_something_is_printed_is_one():
    with pytest.raises(KeyboardInterrupt):
        show(trainer(Own(KeyboardInterrupt())), "a table")


def test_what_works_is_true():
    assert attempt(lambda: None)


def test_an_output_without_unicode_gets_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show(trainer(TQDMProgressBar()), "gr\xf6\xdfe")
    write("gr\xf6\xdfe")
    sys.stdout.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfe\n" * 2


def test_an_output_with_unicode_gets_what_there_is_but_for_halves_of_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert encodable("gr\xf6\xdfe \udc80") == "gr\xf6\xdfe \\udc80"
    monkeypatch.setattr(sys, "stdout", None)  # of a program without a console
    assert encodable("gr\xf6\xdfe") == "gr\xf6\xdfe"


def test_stages_stand_side_by_side_with_fractions_of_the_first():
    assert comparison([DENSE, CUT]).splitlines() == [
        "                   dense      after the cut",
        "accuracy          0.9100             0.7000",
        "loss              0.2500             1.1250",
        "parameters        20,000      5,000 (25.0%)",
        "multiply-adds  4,000,000  1,000,000 (25.0%)",
        "bytes on disk     81,920     24,576 (30.0%)",
        "ms a batch          2.00      3.00 (150.0%)",
    ]


@pytest.mark.parametrize(("spreads", "told"), [((0.1, 0.5), None), ((0.634, 0.1), "63%"), ((0.0, 0.9), "90%")])
def test_times_that_differ_too_far_are_said_to_in_a_line_below(spreads, told):
    stages = [replace(stage, spread=spread) for stage, spread in zip([DENSE, CUT], spreads, strict=True)]
    table, _, line = comparison(stages).partition("\n" + "ms a batch: ")
    assert table == comparison([DENSE, CUT])
    assert line == (f"too unsteady to compare; runs differ by {told} of their median" if told else "")
    assert are_unsteady(stages) == bool(told) and spread_of(stages) == max(spreads)


def test_a_line_below_says_which_batch_the_counts_are_of():
    batch = "64x3x224x224 float32"
    shown = comparison([replace(stage, batch=batch, spread=0.9) for stage in (DENSE, CUT)])
    *table, told, unsteady = shown.splitlines()
    assert "\n".join(table) == comparison([DENSE, CUT])
    assert told == f"multiply-adds and milliseconds are of a batch of {batch}" and "too unsteady" in unsteady
    several = comparison([replace(DENSE, batch=", ".join([batch] * 5))])
    assert max(map(len, several.splitlines())) <= WIDTH and several.count("224x224") == 5


def test_one_stage_alone_has_no_fractions():
    assert "%" not in comparison([DENSE])
    assert len(comparison([DENSE]).splitlines()) == 7


def test_metric_that_a_stage_lacks_is_a_dash_also_where_it_is_the_first():
    lines = comparison([DENSE, Stage("cut", {"loss": 1.0, "late": 2.0}, 1, 1, 1, 1.0)]).splitlines()
    assert lines[1].split() == ["accuracy", "0.9100", "-"]
    assert lines[2].split() == ["loss", "0.2500", "1.0000"]
    assert lines[3].split() == ["late", "-", "2.0000"]


def test_metric_that_is_no_number_is_shown_as_it_is():
    metrics = {"a": math.nan, "b": -math.inf, "c": 1e30}
    lines = comparison([Stage("dense", metrics, 1, 1, 1, 1.0)]).splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["nan", "-inf", "1e+30"]


def test_long_names_and_large_numbers_fit_80_columns_of_ascii():
    name = "validation/of_the_second_loader/mean_average_precision_gr\xf6\xdfe_" + "x" * 40
    large = [
        Stage(title, {name: 0.5, "y": 1e300}, 10**12, 10**15, 10**13, 123456.7)
        for title in ("dense, before", "right after", "at the end")
    ]
    shown = comparison(large)
    assert shown.isascii() and max(map(len, shown.splitlines())) <= WIDTH
    assert "1e+15 (100.0%)" in shown and shown.splitlines()[1].startswith("...")


def test_what_was_not_seen_is_a_dash_and_no_division_by_zero():
    unseen = [Stage(name, {}, 10, 0, 100, 0.0) for name in ("dense", "cut")]
    lines = {line.split("  ")[0]: line.split()[-2:] for line in comparison(unseen).splitlines()[1:]}
    assert lines["multiply-adds"] == lines["ms a batch"] == ["-", "-"]
    assert lines["parameters"] == ["10", "(100.0%)"]
