"""What a person sees: a line of progress in the style of the Trainer's bar, and stages side by side."""

import io
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lr_callback.observation.report import Stage, Told, comparison, is_disabled, progress_line

rich = pytest.importorskip("rich")
pytest.importorskip("rich.console")
pytest.importorskip("rich.progress")

DENSE = Stage("dense", {"accuracy": 0.91, "loss": 0.25}, 20_000, 4_000_000, 81_920, 2.0)
CUT = Stage("after the cut", {"accuracy": 0.7, "loss": 1.125}, 5_000, 1_000_000, 24_576, 3.0)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_bars_say_themselves_whether_they_are_disabled(bar):
    shown = bar()
    assert not is_disabled(shown)
    shown.disable()
    assert is_disabled(shown)


def test_bar_that_says_nothing_is_taken_to_show_itself():
    assert not is_disabled(object())


def disabled():
    bar = TQDMProgressBar()
    bar.disable()
    return bar


@pytest.mark.parametrize("bar", [None, disabled()])
def test_without_a_bar_nothing_is_shown(bar, capsys):
    with progress_line(bar) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_beside_a_tqdm_bar_a_line_counts_the_layers_and_goes_away(capsys):
    with progress_line(TQDMProgressBar()) as progress:
        progress(0, 3, "conv1")
        progress(1, 3, "conv2")
        progress(2, 3, "linear")
    shown = capsys.readouterr().out
    assert "Low-rank analysis" in shown
    assert [name for name in ("0/3", "conv1", "1/3", "conv2", "2/3", "linear") if name not in shown] == []
    assert shown.endswith("\r")  # the line is wiped


def test_what_is_done_and_its_unit_can_be_named(capsys):
    with progress_line(TQDMProgressBar(), "calibration", "batch") as progress:
        assert [*Told("abc", progress)] == ["a", "b", "c"]
    shown = capsys.readouterr().out
    assert "Low-rank calibration" in shown and "2/3" in shown and "batch" in shown


def test_items_without_a_progress_are_those_of_a_list():
    assert [*Told("abc", None)] == ["a", "b", "c"] == Told("abc", None)[:]


@pytest.fixture
def rich_bar():
    return SimpleNamespace(
        progress=rich.progress.Progress(console=rich.console.Console(file=io.StringIO())), is_disabled=False
    )


def test_beside_a_rich_bar_a_task_counts_the_layers_and_is_hidden(rich_bar):
    with progress_line(rich_bar) as progress:
        progress(2, 5, "conv3")
        [task] = rich_bar.progress.tasks
        assert (task.description, task.completed, task.total) == ("Low-rank analysis", 2, 5)
        assert task.visible
    assert not task.visible


def test_rich_task_is_hidden_after_an_error_too(rich_bar):
    with pytest.raises(RuntimeError, match="broken"), progress_line(rich_bar):
        raise RuntimeError("broken")
    assert not rich_bar.progress.tasks[0].visible


def test_rich_bar_of_a_trainer_that_has_not_started_shows_its_own_line(capsys):
    bar = RichProgressBar()
    Trainer(accelerator="cpu", callbacks=[bar], logger=False, enable_checkpointing=False)
    bar.setup(SimpleNamespace(is_global_zero=True), LightningModule(), "fit")
    with progress_line(bar) as progress:
        progress(0, 1, "linear")
    assert "Low-rank analysis" in capsys.readouterr().out


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


def test_one_stage_alone_has_no_fractions():
    assert "%" not in comparison([DENSE])
    assert len(comparison([DENSE]).splitlines()) == 7


def test_metric_that_a_stage_lacks_is_a_dash():
    lines = comparison([DENSE, Stage("cut", {"loss": 1.0}, 1, 1, 1, 1.0)]).splitlines()
    assert lines[1].split() == ["accuracy", "0.9100", "-"]
    assert lines[2].split() == ["loss", "0.2500", "1.0000"]


def test_what_was_not_seen_is_a_dash_and_no_division_by_zero():
    unseen = [Stage(name, {}, 10, 0, 100, 0.0) for name in ("dense", "cut")]
    lines = {line.split("  ")[0]: line.split()[-2:] for line in comparison(unseen).splitlines()[1:]}
    assert lines["multiply-adds"] == lines["ms a batch"] == ["-", "-"]
    assert lines["parameters"] == ["10", "(100.0%)"]
