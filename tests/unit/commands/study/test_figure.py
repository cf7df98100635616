"""The figure: its axes, lines and legend."""

import sys
from itertools import product

import pytest

from lr_callback.commands.study.figure import compose, draw
from lr_callback.commands.study.rows import Row


def row(method, kept, seed=0, after=0.9, kept_multiply_adds=None, metric="test_accuracy") -> Row:
    values = {"right_after": {metric: after / 2}, "after": {metric: after}}
    return Row(f"{method}{kept}{seed}", method, kept, seed, 4, 10, 10, kept, kept_multiply_adds, **values)


def rows() -> list[Row]:
    found = [row("dense", 1.0, seed, 0.98 + seed / 100, 1.0) for seed in (0, 1)]
    for kept, seed in product((0.5, 0.2), (0, 1)):
        found.append(row("worse", kept, seed, 0.5 * kept + seed / 50, kept / 2))
        found.append(row("better", kept, seed, 0.9, kept / 2))
    return [*found, Row("x", "refused", 0.01, 0, 4, reason="no")]


def test_it_shows_both_moments_against_parameters_and_multiply_adds():
    pytest.importorskip("matplotlib")
    panels = compose(rows(), "test_accuracy").axes
    assert [one.get_ylabel() for one in panels[::2]] == [
        "test accuracy (%)\nright after the cut",
        "test accuracy (%)\nafter 4 epochs",
    ]
    assert [one.get_xlabel() for one in panels[2:]] == ["parameters kept (%)", "multiply-adds kept (%)"]
    for panel in panels:
        left, right = panel.get_xlim()
        assert left > right and panel.get_xscale() == "log"


def test_it_has_a_line_of_means_for_each_method_and_the_control_with_its_band():
    pytest.importorskip("matplotlib")
    figure = compose(rows(), "test_accuracy")
    panel = figure.axes[2]
    lines = {one.get_label().removeprefix("method "): one.lines[0] for one in panel.containers}
    assert set(lines) == {"worse", "better"}
    assert lines["worse"].get_xdata().tolist() == pytest.approx([50, 20])
    assert lines["worse"].get_ydata().tolist() == pytest.approx([26, 11])
    (control,) = [line for line in panel.lines if line.get_label() == "dense control"]
    assert list(control.get_ydata()) == pytest.approx([98.5, 98.5])
    (band,) = panel.patches
    assert band.get_height() == pytest.approx(2 * 0.7071, rel=1e-3)
    assert figure.axes[3].containers[0].lines[0].get_xdata().tolist() == pytest.approx([25, 10])


def test_the_legend_stands_in_the_order_of_the_last_points():
    pytest.importorskip("matplotlib")
    (legend,) = compose(rows(), "test_accuracy").legends
    assert [text.get_text() for text in legend.get_texts()] == ["better", "worse", "dense control"]


def test_names_are_drawn_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["_ALDS", "<b>$x_{$", "[red]", "method "]
    found = [row("dense", 1.0), *(row(name, 0.5, after=0.9 - place / 10) for place, name in enumerate(names))]
    (legend,) = compose(found, "test_accuracy").legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "dense control"]
    assert draw(found, "test_accuracy", tmp_path / "study.png").stat().st_size > 1000


def test_without_training_or_counted_multiply_adds_there_is_one_panel():
    pytest.importorskip("matplotlib")
    plain = [Row(**{**vars(one), "after": {}, "kept_multiply_adds": None}) for one in rows()]
    (panel,) = compose(plain, "test_accuracy").axes
    assert panel.get_xlabel() == "parameters kept (%)"


def test_one_size_is_not_looked_at_through_a_lens():
    pytest.importorskip("matplotlib")
    panel = compose([row("one", 0.5), row("other", 0.49)], "test_accuracy").axes[0]
    high, low = panel.get_xlim()
    assert high / low == pytest.approx(1.8)
    assert {40, 50, 60} <= set(panel.get_xticks())


def test_shares_near_all_are_told_apart():
    pytest.importorskip("matplotlib")
    panel = compose([*rows(), row("best", 0.5, after=1.0)], "test_accuracy").axes[2]
    heights = panel.transData.transform([(30, value) for value in (0, 50, 98, 99, 100)])[:, 1]
    assert sorted(heights) == list(heights)
    assert heights[3] - heights[2] > 0.3 * (heights[1] - heights[0])
    scale = panel.yaxis.get_transform()
    assert scale.inverted().transform(scale.transform([0, 50, 98, 100])) == pytest.approx([0, 50, 98, 100])
    assert {90, 98, 100} <= set(panel.get_yticks()) and panel.get_ylim()[1] <= 100


def test_a_loss_is_not_in_percent():
    pytest.importorskip("matplotlib")
    losses = [row("ALDS", 0.5, metric="test_loss", after=2.5)]
    panel = compose(losses, "test_loss").axes[-1]
    assert panel.get_ylabel().startswith("test loss\n")
    assert panel.containers[0].lines[0].get_ydata().tolist() == [2.5]


def test_more_methods_than_colours_are_told_apart():
    pytest.importorskip("matplotlib")
    many = [row(f"method {number}", 0.5, after=number / 30) for number in range(25)]
    lines = [one.lines[0] for one in compose(many, "test_accuracy").axes[0].containers]
    looks = {(one.get_color(), one.get_marker(), one.get_linestyle()) for one in lines}
    assert len(looks) == 25


def test_it_is_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    file = draw(rows(), "test_accuracy", tmp_path / "study.png")
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [file]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"not drawn: matplotlib must be installed.*lr_callback\[study\]"):
        draw(rows(), "test_accuracy", tmp_path / "study.png")
