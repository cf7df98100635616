"""Figures: what is drawn is what the values say, names as they are, and nothing is left behind."""

import copy
import pickle
import sys
from dataclasses import replace

import matplotlib
import pytest
import torch
from matplotlib import _pylab_helpers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import lr_callback as lrc
from lr_callback.observation.figures import MOST_PANELS, MOST_ROWS, plot_allocation, plot_spectra, plot_tradeoff

NAMES = ["x_$a^2$", "<b>bold</b>", "_hidden", "größe", "层", "two\nlines", "$y", "n" * 90, "\\$z\\alpha$"]


def named(names: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for index, name in enumerate(names):
        model.add_module(name, nn.Linear(24 + index % 50, 32))
    return model


def analysed(model: nn.Module, ratio: float = 0.5, method: lrc.Method | None = None):
    analysis = lrc.analyze(model, method=method)
    allocation = analysis.allocate(ratio)
    return allocation, analysis.curves(allocation)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return analysed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.BatchNorm1d(96)))


@pytest.fixture
def drawn():
    """Draw a figure as a logger does; a warning of matplotlib's is an error."""
    return lambda figure: figure.savefig("/dev/null", format="png", dpi=40)


def labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_bars_are_the_costs_of_the_layers(small):
    allocation, _ = small
    figure, axes = plot_allocation(allocation)
    assert isinstance(figure, Figure) and axes in figure.axes
    dense, kept = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert dense == [64 * 96 + 96, 64 * 64 + 64] and labels(axes) == ["1", "0", "everything else"]
    assert kept == [allocation.layers["1"].cost, allocation.layers["0"].cost]
    assert [text.get_text().strip() for text in axes.texts][-1] == "192 of 192, 100%"
    assert axes.get_title(loc="left") == f"{allocation.cost / allocation.dense_cost:.1%} of parameters kept"


def test_a_budget_in_time_has_bars_in_microseconds_and_a_title_of_its_name(small):
    _, axes = plot_allocation(replace(small[0], unit="latency"))
    assert axes.get_xlabel() == "microseconds" and axes.get_title(loc="left").endswith(" of latency kept")


def test_rows_are_few_and_what_they_leave_out_is_summed_up():
    """They may be as large as the smallest that is shown, and are not called smaller."""
    allocation, _ = analysed(named([f"layer{index}" for index in range(60)]), 0.7, lrc.ALDS(slices=[1]))
    _, axes = plot_allocation(allocation)
    assert len(labels(axes)) == MOST_ROWS and labels(axes)[-1] == "21 other layers, everything else"
    dense, kept = (sum(bar.get_width() for bar in bars) for bars in axes.containers)
    rest = axes.texts[-1].get_text()
    assert rest == f" {(allocation.cost - kept) / 1000:.3g}k of {(allocation.dense_cost - dense) / 1000:.3g}k, " + (
        f"{(allocation.cost - kept) / (allocation.dense_cost - dense):.0%}"
    )


def test_one_layer_that_is_left_over_is_told_as_one():
    allocation, _ = analysed(named([f"layer{index}" for index in range(MOST_ROWS)]), 0.7, lrc.ALDS(slices=[1]))
    _, axes = plot_allocation(allocation)
    assert labels(axes)[-1] == "1 other layer, everything else"


def test_layers_that_stay_dense_have_a_row_in_parameters(small):
    allocation, _ = analysed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), 1.0)
    _, axes = plot_allocation(allocation)
    assert [bar.get_width() for bar in axes.containers[1]] == [64 * 96, 64 * 64]


def test_spectra_have_a_panel_for_each_layer_with_its_cut(small):
    allocation, curves = small
    _, panels = plot_spectra(curves)
    for name, panel in zip(curves.layers, panels.flat, strict=True):
        spectrum, cut = panel.lines
        assert tuple(spectrum.get_xdata()) == curves.layers[name].ranks
        assert tuple(spectrum.get_ydata()) == curves.layers[name].values
        assert set(cut.get_xdata()) == {allocation.layers[name].rank}
        assert f"rank {allocation.layers[name].rank} of" in panel.get_title(loc="left")


def test_spectra_of_some_layers_in_axes_of_the_caller(small):
    _, curves = small
    figure = Figure()
    ax = figure.subplots()
    assert plot_spectra(curves, ["1"], ax=ax) == (figure, ax)
    line, dot = ax.lines
    assert tuple(line.get_ydata()) == curves.layers["1"].values
    assert list(dot.get_xdata()) == [curves.layers["1"].rank]


def test_panels_are_few_and_the_largest():
    _, curves = analysed(named([f"layer{index}" for index in range(40)]), 0.7, lrc.ALDS(slices=[1]))
    figure, panels = plot_spectra(curves)
    assert panels.size == MOST_PANELS
    assert figure.get_suptitle().endswith("; 16 other layers are not shown")
    assert panels.flat[-1].get_title(loc="left").startswith("layer39\n")


def test_title_of_few_panels_is_not_cut_off():
    _, curves = analysed(named(["one", "two"]))
    figure, _ = plot_spectra(replace(curves, error="activation", left_out=1000))
    figure.draw_without_rendering()
    box, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert whole.x0 < box.x0 and box.x1 < whole.x1


def test_layer_without_singular_values_is_drawn_by_its_error():
    _, curves = analysed(nn.Sequential(nn.Linear(64, 64)), method=lrc.ALDS("operator", slices=[4]))
    _, panels = plot_spectra(curves)
    assert panels[0][0].get_title(loc="left").endswith("(error)")
    assert tuple(panels[0][0].lines[0].get_ydata()) == curves.layers["0"].errors


def test_steep_spectra_are_drawn_on_a_logarithmic_scale(drawn):
    layer = nn.Linear(32, 32, bias=False)
    nn.init.orthogonal_(layer.weight)
    layer.weight.data *= torch.logspace(0, -12, 32)
    figure, panels = plot_spectra(analysed(nn.Sequential(layer), 0.8, lrc.ALDS(slices=[1]))[1])
    assert panels[0][0].get_yscale() == "log"
    drawn(figure)


def test_layer_that_was_cut_before_does_not_press_the_spectra_of_the_others_flat(drawn):
    torch.manual_seed(0)
    before, other = nn.Linear(64, 64), nn.Linear(64, 64)
    before.weight.data = torch.randn(64, 2) @ torch.randn(2, 64)
    figure, panels = plot_spectra(analysed(nn.Sequential(before, other), 0.6, lrc.ALDS(slices=[1]))[1])
    seen = panels[0][1].lines[0].get_ydata()
    assert panels[0][0].get_yscale() == "linear" and panels[0][0].lines[0].get_ydata()[2] < 1e-4
    assert panels[0][1].get_ylim()[0] <= min(seen) < max(seen) <= panels[0][1].get_ylim()[1]
    drawn(figure)


def test_tradeoff_has_the_points_of_the_curves_and_the_chosen_one(small):
    _, curves = small
    _, axes = plot_tradeoff(curves)
    worst, chosen = axes.lines[:2]
    assert list(worst.get_xdata()) == [100 * one.cost / curves.dense_cost for one in curves.tradeoff]
    assert list(worst.get_ydata()) == [one.worst_error for one in curves.tradeoff]
    assert list(chosen.get_ydata()) == [curves.chosen.worst_error]


def test_names_are_drawn_as_they_are(drawn):
    allocation, curves = analysed(named(NAMES))
    figure, axes = plot_allocation(allocation)
    shown = set(labels(axes))
    assert {"x_$a^2$", "<b>bold</b>", "_hidden", "größe", "\\u5c42", "two\\nlines", "$y", "\\$z\\alpha$"} <= shown
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    drawn(figure)
    drawn(plot_spectra(curves)[0])
    figure = Figure()
    ax = figure.subplots()
    plot_spectra(curves, ax=ax)
    assert len(ax.get_legend().get_texts()) == len(NAMES)
    drawn(figure)


def test_one_layer_and_a_layer_of_rank_one_are_drawn(drawn):
    allocation, curves = analysed(nn.Sequential(nn.Linear(2, 9, bias=False)), 0.7, lrc.ALDS(slices=[1]))
    assert curves.layers["0"].ranks == (1,)
    for figure in (plot_allocation(allocation)[0], plot_spectra(curves)[0], plot_tradeoff(curves)[0]):
        drawn(figure)


def test_nothing_of_pyplot_is_left_behind(small, drawn):
    before = dict(matplotlib.rcParams)
    allocation, curves = small
    for figure in (plot_allocation(allocation)[0], plot_spectra(curves)[0], plot_tradeoff(curves)[0]):
        drawn(figure)
    assert not _pylab_helpers.Gcf.get_all_fig_managers() and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [plot_spectra, plot_tradeoff])
def test_an_allocation_is_drawn_as_its_curves_are(draw, small, drawn):
    allocation, curves = small
    (figure, _), (other, _) = draw(allocation), draw(curves)
    drawn(figure)
    for one, of_curves in zip(figure.axes, other.axes, strict=True):
        for line, own in zip(one.lines, of_curves.lines, strict=True):
            assert line.get_xydata().tolist() == own.get_xydata().tolist()


def test_allocations_know_their_curves_until_they_are_written_and_no_longer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    allocation = lrc.allocate(model, 0.5, cost=lambda module: sum(one.numel() for one in module.parameters()))
    assert allocation.curves().chosen.cost == allocation.cost
    known = replace(allocation, sampled=allocation.curves())
    assert pickle.loads(pickle.dumps(known)).curves() == known.curves()
    assert "sampled" not in allocation.to_dict() and "sampled" not in repr(allocation)
    read = [lrc.Allocation.from_json(allocation.to_json()), pickle.loads(pickle.dumps(allocation))]
    for one in (copy.copy(allocation), copy.deepcopy(allocation)):
        assert one == allocation and one.layers is not None and one.curves() == allocation.curves()
    assert copy.deepcopy(allocation).layers is not allocation.layers
    for one in read:
        assert one == allocation and str(one) == str(allocation)
        with pytest.raises(ValueError, match=r"it was read from a file, or came from another process\. Use"):
            one.curves()


@pytest.mark.parametrize("draw", ["plot_spectra", "plot_tradeoff"])
def test_the_call_that_the_error_tells_gives_the_figure(draw, drawn):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    read = lrc.Allocation.from_json(lrc.allocate(model, 0.5).to_json())
    names = {"lr_callback": lrc, "model": model, "allocation": read}
    with pytest.raises(ValueError, match="must be at hand to be drawn") as raised:
        getattr(lrc, draw)(read)
    figure, _ = getattr(lrc, draw)(eval(str(raised.value).split("`")[3], names))
    drawn(figure)


@pytest.mark.parametrize("draw", [plot_spectra, plot_tradeoff])
def test_what_is_no_allocation_is_refused(draw):
    with pytest.raises(TypeError, match=rf"{draw.__name__}: .* must be an Allocation, .*, or its Curves; got Linear"):
        draw(nn.Linear(2, 2))


def test_curves_of_an_allocation_of_another_method_or_unit_are_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    sliced = lrc.allocate(model, 0.5, method=lrc.ALDS(slices=[4]))
    assert all(layer.num_slices == 4 for layer in sliced.layers.values())
    refused = {
        "slices": (lrc.analyze(model, lrc.ALDS(slices=[1])), sliced),
        "error": (lrc.analyze(model, lrc.ALDS("frobenius")), lrc.allocate(model, 0.5)),
        "unit": (lrc.analyze(model), lrc.allocate(model, 0.5, cost="bytes")),
    }
    for analysis, allocation in refused.values():
        with pytest.raises(ValueError, match=r"same method; its layers, its unit, its error or its slices are others"):
            analysis.curves(allocation)
    assert lrc.analyze(model, lrc.ALDS(slices=[4])).curves(sliced).chosen.cost == sliced.cost


def test_curves_are_no_allocation(small):
    with pytest.raises(TypeError, match=r"plot_allocation: .* must be an Allocation.*; got Curves"):
        plot_allocation(small[1])


@pytest.mark.parametrize("layers", ["0", ["nowhere"]])
def test_layers_without_a_curve_are_refused(layers, small):
    with pytest.raises(ValueError, match=r"`layers` must be a list of names of layers that have a curve, such as"):
        plot_spectra(small[1], layers)


@pytest.mark.parametrize("draw", [plot_allocation, plot_spectra, plot_tradeoff])
def test_without_matplotlib_it_says_what_to_install(draw, small, without_matplotlib):
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lr_callback\[figures\]'"):
        draw(small[0] if draw is plot_allocation else small[1])


@pytest.mark.parametrize("name", ["plot_allocation", "plot_spectra", "plot_tradeoff"])
def test_functions_are_public(name):
    assert getattr(lrc, name) is globals()[name] and name in lrc.__all__


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Let the import of matplotlib fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
