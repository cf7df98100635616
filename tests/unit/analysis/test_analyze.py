"""Analysis: what is asked for is checked, what is found is priced, and nothing is changed."""

import math

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import survey
from lr_callback.decisions.costs import COUNTED
from lr_callback.decisions.goals import check_keep_ratio
from lr_callback.model.held import dense_parameters
from lr_callback.model.observe import observe
from lr_callback.model.pricing import Prices


class Special(nn.Conv2d):
    """A subclass, which is not factorized."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Special(16, 16, 3, groups=4), nn.Flatten(), nn.Linear(64, 32)
    )


@pytest.fixture
def model():
    """Give a model, and check afterwards that every bit of it is as before."""
    made = network()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    modules = list(made.modules())
    yield made
    assert list(made.modules()) == modules
    assert list(made.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, 2, math.nan, math.inf, True, "0.5", None, [0.5]], ids=repr)
def test_a_ratio_that_is_no_number_in_0_to_1_is_refused(model, ratio):
    message = r"`keep_ratio` must be a number in \(0, 1\], the fraction of the model to keep, got "
    refusing = [check_keep_ratio, lrc.analyze(model).allocate]
    if ratio is not None:  # not given: the default
        refusing.append(lambda given: lrc.allocate(model, given))
    for refuse in refusing:
        with pytest.raises(ValueError, match=message):
            refuse(ratio)


@pytest.mark.parametrize("ratio", [1, 1.0, 0.5, 1e-9])
def test_a_ratio_in_range_is_returned_as_a_float(ratio):
    assert check_keep_ratio(ratio) == ratio
    assert type(check_keep_ratio(ratio)) is float


def test_a_budget_below_reach_tells_the_range_and_both_of_its_ends_can_be_met(model):
    analysis = lrc.analyze(model)
    low, high = analysis.reachable
    with pytest.raises(ValueError, match=rf"`keep_ratio`=0\.01: .*Reachable: keep_ratio from {low:.4f} to 1"):
        lrc.allocate(model, 0.01)
    assert high == 1.0
    assert analysis.allocate(low).cost == round(low * analysis.dense_cost)
    with pytest.raises(ValueError, match="Reachable"):
        analysis.allocate(low - 1 / analysis.dense_cost)
    assert analysis.allocate(1.0).factorized == {}


def test_the_message_about_a_budget_names_its_parts(model):
    analysis = lrc.analyze(model)
    assert analysis.fixed_cost == sum(one.numel() for one in model.parameters()) - 3 * 9 * 16 - 16 - 64 * 32 - 32
    with pytest.raises(ValueError, match=f"{analysis.fixed_cost:,} parameters are in layers that are not factorized"):
        analysis.allocate(0.01)


def test_nothing_to_factorize_lists_what_was_skipped_and_why():
    with pytest.raises(
        ValueError, match=r"Nothing to factorize.*Skipped: 0: Special is not.*; 1: too small: no rank costs less"
    ):
        lrc.allocate(nn.Sequential(Special(2, 2, 1), nn.Linear(1, 4)))
    with pytest.raises(ValueError, match="Skipped: no layer with a weight was found"):
        lrc.allocate(nn.ReLU())


def test_of_many_layers_that_are_skipped_alike_the_first_are_named_in_the_order_of_the_model():
    layers = [*[nn.Linear(1, 1) for _ in range(500)], Special(2, 2, 1)]
    with pytest.raises(ValueError, match=r"Skipped: 500: Special is not") as caught:
        lrc.allocate(nn.Sequential(*layers))
    assert str(caught.value).endswith("; 0, 1, 2, 3, 4, ...: too small: no rank costs less than the dense layer.")


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(model, argument):
    with pytest.raises(ValueError, match=rf"`{argument}`.*'head' matches none of: 0, 4, 2"):
        lrc.allocate(model, 0.5, **{argument: "head"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("read", [lrc.allocate, lrc.analyze, survey])
def test_a_weight_that_is_not_finite_is_refused_with_its_layer(value, read):
    model = network()
    with torch.no_grad():
        model[4].weight[3, 3] = value
    with pytest.raises(ValueError, match=r"^4: every weight must be finite, found 1 of 2048"):
        read(model)


def test_a_broken_layer_that_is_excluded_does_not_matter():
    model = network()
    nn.init.constant_(model[4].weight, math.nan)
    assert list(lrc.allocate(model, 0.99, exclude="4").layers) == ["0"]


def test_an_all_zero_layer_is_skipped_with_its_reason():
    model = network()
    nn.init.zeros_(model[0].weight)
    allocation = lrc.allocate(model, 0.7)
    assert "all its weights are zero" in allocation.skipped["0"]
    assert list(allocation.layers) == ["4"]


def test_layers_of_one_channel_or_a_1x1_kernel_are_analysed_or_too_small():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 1, 1), nn.Conv2d(8, 8, (1, 3)))
    allocation = lrc.allocate(model, 0.8, method=lrc.ALDS(foldings=["kernel_in_encoder", "kernel_in_decoder"]))
    assert list(allocation.layers) == ["0", "1", "3"]
    assert allocation.skipped == {"2": "too small: no rank costs less than the dense layer"}
    report = lrc.factorize_(model, allocation)
    assert report.parameters_after == allocation.cost <= 0.8 * allocation.dense_cost


def test_an_unknown_cost_and_a_missing_example_are_refused(model):
    units = r"\['parameters', 'multiply_adds', 'bytes', 'latency', 'activation_memory'\], or a function of a module"
    with pytest.raises(ValueError, match=f"`cost` must be one of {units}, got 'flops'"):
        lrc.allocate(model, cost="flops")
    with pytest.raises(ValueError, match="`example_input`"):
        lrc.allocate(model, cost="multiply_adds")


def test_a_layer_that_the_example_does_not_reach_is_skipped_in_multiply_adds():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, inputs):
            return self.used(inputs)

    allocation = lrc.allocate(Half(), 0.5, cost="multiply_adds", example_input=torch.zeros(1, 32))
    assert allocation.skipped == {"unused": "its forward is not called on the example input"}
    assert allocation.dense_cost == 1024


@pytest.mark.parametrize("unit", COUNTED)
def test_a_survey_has_the_prices_of_an_analysis(model, unit):
    prices = Prices(unit, observe(model, torch.zeros(1, 3, 6, 6)))
    surveyed, analysed = survey(model, prices=prices), lrc.analyze(model, prices=prices)
    assert (surveyed.unit, surveyed.dense_cost, surveyed.fixed_cost) == (unit, analysed.dense_cost, analysed.fixed_cost)
    assert surveyed.reachable == analysed.reachable
    assert (surveyed.shapes, surveyed.skipped) == (analysed.shapes, analysed.skipped)


def test_a_factorized_model_is_analysed_as_the_dense_one_that_it_stands_for():
    model = network()
    dense = dense_parameters(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert dense_parameters(model) == dense > sum(one.numel() for one in model.parameters())
    again = lrc.allocate(model, 0.5)
    assert again.dense_cost == dense
    assert again.shapes["0"] == (16, 3, 3, 3)


def test_a_shared_layer_counts_once():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert lrc.allocate(model, 0.5).dense_cost == dense_parameters(model) == 32 * 33


def test_progress_is_told_before_each_layer(model):
    told = []
    lrc.analyze(model, progress=lambda *seen: told.append(seen))
    assert told == [(0, 2, "0"), (1, 2, "4")]


def test_the_allocation_says_what_was_asked(model):
    allocation = lrc.allocate(model, 0.6, method=lrc.ALDS(error="operator", max_slices=2), exclude="0")
    assert (allocation.keep_ratio, allocation.unit, allocation.error) == (0.6, "parameters", "operator")
    assert allocation.method["name"] == "ALDS"
    assert allocation.budget == math.floor(0.6 * allocation.dense_cost)
    assert set(allocation.skipped) == {"0", "2"}
