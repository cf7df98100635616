"""Progress where nothing moves: a few plain lines, none of what is quick, and errors that end nothing."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

import lr_callback.observation.progress as module
from lr_callback.observation.progress import FIRST_LINE, NEXT_LINES, Told, progress_line


def trainer(*bars):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(callbacks=list(bars), enable_progress_bar=bool(bars), **settings)


def disabled():
    bar = TQDMProgressBar()
    bar.disable()
    return bar


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last entry is the time."""
    times = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: times[-1])
    return times


def walk(clock, seconds, count=60, bars=(), **options):
    """Go through a step whose items take so many seconds each."""
    with progress_line(trainer(*bars), "analysis", **options) as progress:
        for done in range(count):
            progress(done, count, f"layers.{done}")
            clock.append(clock[-1] + seconds)


@pytest.fixture
def lines(caplog):
    """Return a function that returns the lines that were logged."""
    caplog.set_level("INFO")
    return lambda: [text for text in caplog.messages if text.startswith("Low-rank")]


@pytest.mark.parametrize("bars", [(), (disabled(),)], ids=["none", "disabled"])
def test_without_a_bar_a_long_step_is_told_after_some_seconds_then_now_and_then_then_that_it_is_done(
    clock, lines, bars, capsys
):
    walk(clock, 1, bars=bars)
    assert (FIRST_LINE, NEXT_LINES) == (5, 10)
    assert lines() == [
        *(
            f"Low-rank analysis: layer {done + 1} of 60 (layers.{done}) after {done} s"
            for done in (5, 15, 25, 35, 45, 55)
        ),
        "Low-rank analysis: done in 60 s",
    ]
    assert capsys.readouterr().out == ""


def test_a_quick_step_is_not_told(clock, lines):
    walk(clock, 0.05)
    assert lines() == []


def test_lines_that_would_say_what_others_say_are_left_out(clock, lines):
    with progress_line(trainer(), "search", "try", plain=False) as progress:
        assert progress is None
    assert lines() == []


def test_beside_a_bar_that_writes_to_no_terminal_there_are_the_same_lines_and_no_carriage_returns(clock, capsys):
    walk(clock, 1, count=10, bars=[TQDMProgressBar()])
    assert capsys.readouterr().out.splitlines() == [
        "Low-rank analysis: layer 6 of 10 (layers.5) after 5 s",
        "Low-rank analysis: done in 10 s",
    ]


def test_a_step_that_fails_is_not_told_as_done(clock, lines):
    with pytest.raises(RuntimeError, match="broken"), progress_line(trainer(), "refit") as progress:
        clock.append(clock[-1] + 9)
        progress(0, 2, "")
        raise RuntimeError("broken")
    assert lines() == ["Low-rank refit: layer 1 of 2 after 9 s"]


def test_names_are_printable(clock, lines):
    with progress_line(trainer()) as progress:
        clock.append(clock[-1] + 9)
        progress(0, 2, "_orig_mod.gr\xf6\xdfe\x1b[2J")
    assert lines()[0] == "Low-rank analysis: layer 1 of 2 (gr\\xf6\\xdfe\\x1b[2J) after 9 s"


def test_other_ranks_show_nothing(monkeypatch):
    other = trainer()
    monkeypatch.setattr(type(other.strategy), "is_global_zero", False)
    with progress_line(other) as progress:
        assert progress is None


def test_items_tell_the_progress_of_each():
    told = []
    assert [*Told("abc", lambda *given: told.append(given))] == ["a", "b", "c"]
    assert told == [(0, 3, ""), (1, 3, ""), (2, 3, "")]


def test_items_without_a_progress_are_those_of_a_list():
    assert [*Told("abc", None)] == ["a", "b", "c"] == Told("abc", None)[:]
