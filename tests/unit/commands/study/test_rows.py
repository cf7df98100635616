"""Rows of studies: their summary, and the metric that they are shown by."""

import re

import pytest

from lr_callback.commands.study.rows import Row, Spread, choose_metric, difference, grouped, spread, summary


def row(method="ALDS", keep_ratio=0.5, seed=0, right_after=0.5, after=0.9, **changes) -> Row:
    own = {"kept_parameters": keep_ratio, "kept_multiply_adds": keep_ratio, "parameters": 100}
    own |= {"right_after": {"test_accuracy": right_after}, "after": {"test_accuracy": after}, **changes}
    return Row(f"{method}{keep_ratio}{seed}", method, keep_ratio, seed, 2, **own)


ROWS = [
    row("dense", 1.0, 0, 0.98, 0.99),
    row("ALDS", 0.5, 0, 0.6, 0.97),
    row("dense", 1.0, 1, 0.96, 0.97),
    row("ALDS", 0.5, 1, 0.8, 0.96),
]


def test_a_summary_has_the_mean_the_spread_and_the_difference_of_the_same_seeds():
    lines = [re.split(r" {2,}", line) for line in summary(ROWS, "test_accuracy").splitlines()]
    assert lines[0][-3:] == ["test_accuracy %, right after", "after 2 epochs", "- dense"]
    assert lines[1] == ["dense", "1", "100.0", "100.0", "97.00 ±1.41", "98.00 ±1.41", "-"]
    assert lines[2] == ["ALDS", "0.5", "50.0", "50.0", "70.00 ±14.14", "96.50 ±0.71", "-1.50 ±0.71"]


def test_without_training_the_difference_is_right_after_the_cut():
    rows = [Row(**{**vars(one), "after": {}, "epochs": 0}) for one in (ROWS[0], ROWS[1])]
    shown = summary(rows, "test_accuracy").splitlines()
    assert "epochs" not in shown[0]
    assert re.split(r" {2,}", shown[2])[-2:] == ["60.00", "-38.00"]


def test_a_run_that_made_nothing_is_told_of_with_its_reason():
    refused = Row("key", "L-Rank", 0.01, 0, 2, reason="the budget must be at least 5")
    shown = summary([*ROWS, refused], "test_accuracy").splitlines()
    assert shown[-1] == "L-Rank, keep 0.01, seed 0: the budget must be at least 5"
    assert len(shown) == 4
    assert ("L-Rank", 0.01) not in grouped([*ROWS, refused])


def test_a_loss_is_shown_as_it_is():
    rows = [Row("key", "dense", 1.0, 0, 0, right_after={"test_loss": 0.25})]
    assert spread(rows, "right_after", "test_loss") == Spread((0.25,))
    assert spread(rows, "after", "test_loss") is None


def test_a_control_of_another_seed_is_not_compared_with():
    assert difference([row(seed=5)], ROWS[:1], "after", "test_accuracy") is None


def test_cells_are_flat_and_name_the_moment():
    cells = row().cells()
    assert (cells["right_after_test_accuracy"], cells["after_test_accuracy"]) == (0.5, 0.9)
    assert not {"right_after", "after"} & set(cells)


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["loss", "top_acc"], None, "top_acc"),
        (["perplexity", "test_loss"], None, "test_loss"),
        (["perplexity", "bleu"], None, "perplexity"),
        (["test_acc", "test_loss"], "test_loss", "test_loss"),
    ],
)
def test_the_metric_is_the_one_asked_for_or_an_accuracy_or_a_loss(names, asked, chosen):
    assert choose_metric(names, asked) == chosen


def test_a_metric_that_is_not_logged_is_refused():
    with pytest.raises(ValueError, match=r"`metric` must be one of \['test_loss'\], which .* logs, got 'accuracy'"):
        choose_metric(["test_loss"], "accuracy")
    with pytest.raises(ValueError, match=r"`model`: its test step, .* must log a metric, .* found none"):
        choose_metric([])
