"""Overrides: some layers become what is said, the others share what is left of the budget."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze, survey
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.model.observe import observe
from lr_callback.model.overrides import read_overrides
from lr_callback.model.pricing import Prices


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(), nn.Linear(64, 48), nn.Linear(48, 24)
    )


METHODS = [
    lrc.ALDS(),
    lrc.ALDS("frobenius", "sum"),
    lrc.ALDS(max_slices=1),
    lrc.LRank(),
    lrc.UniformRank(),
    lrc.ALDSK(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{type(one).__name__} {one.error}")
def test_a_layer_has_the_form_that_is_given_and_the_others_the_rest_of_the_budget(method):
    model = network()
    pins = {"0": {"rank": 2, "num_slices": 4}, "type:Linear": {"rank": 5}, "1": "dense"}
    allocation = lrc.allocate(model, 0.7, method=method, overrides={**pins, "type:Linear": {"rank": 5}})
    assert (allocation.layers["0"].num_slices, allocation.layers["0"].rank) == (4, 2)
    assert all((allocation.layers[name].num_slices, allocation.layers[name].rank) == (1, 5) for name in "34")
    assert allocation.skipped["1"] == "stays dense by `overrides`"
    assert allocation.cost <= allocation.budget
    report = lrc.factorize_(model, allocation)
    assert sum(parameter.numel() for parameter in model.parameters()) == allocation.cost
    assert set(report.factorized) == {"0", "3", "4"}


@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{type(one).__name__} {one.error}")
def test_what_is_not_overridden_is_chosen_as_if_the_rest_were_fixed(method):
    model, pins = network(), {"3": {"rank": 6}}
    analysis = analyze(model, method, overrides=pins)
    assert set(analysis.free) == {"0", "1", "4"}
    allocation = analysis.allocate(0.5)
    rest = method.solve(analysis.free, allocation.budget - analysis.fixed_cost)
    for name, choice in rest.choices.items():
        layer = allocation.layers[name]
        found = None if layer is None else (layer.folding, layer.num_slices, layer.rank)
        assert found == (None if choice is None else (choice[0].folding, choice[0].num_slices, choice[1]))
    assert analysis.smallest_cost == survey(model, method, overrides=pins).smallest_cost


def test_an_error_that_is_given_is_that_of_the_layer_that_is_built():
    model = network()
    allocation = lrc.allocate(model, 0.9, method=lrc.ALDS("operator"), overrides={"3": {"rank": 3}})
    dense, made = model[3].weight.detach().double(), copy.deepcopy(model)
    lrc.factorize_(made, allocation)
    off = torch.linalg.matrix_norm(dense - made[3].weight.detach().double(), 2)
    assert allocation.layers["3"].relative_error == pytest.approx((off / torch.linalg.matrix_norm(dense, 2)).item())


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_a_fraction_is_of_the_layer_itself_and_the_best_form_within_it_is_taken(ratio):
    model = network()
    allocation = lrc.allocate(model, 0.9, overrides={"3": {"keep_ratio": ratio}})
    layer, dense = allocation.layers["3"], sum(one.numel() for one in model[3].parameters())
    if ratio == 1:
        assert layer is None
        return
    assert layer.cost <= ratio * dense
    forms = analyze(model).layers["3"].candidates
    within = [one.errors[1:][one.costs[1:] <= ratio * dense] for one in forms]
    assert layer.relative_error == pytest.approx(float(torch.cat(within).min()))


def test_ranks_of_a_fraction_are_multiples_like_those_of_the_rest():
    allocation = lrc.allocate(network(), 0.9, method=lrc.ALDS(rank_multiple=4), overrides={"3": {"keep_ratio": 0.6}})
    assert all(one.rank % 4 == 0 for one in allocation.factorized.values()) and "3" in allocation.factorized


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"9": "dense"}, r"`overrides`: each pattern must match a layer's name, '9' matches none of: 0, 1, 3, 4"),
        (
            {"3": {"rank": 999}},
            r"`overrides`: 3 with 1 slice\(s\) of rank 999 costs no less .* largest rank .* is 27\.",
        ),
        (
            {"0": {"rank": 1, "num_slices": 3}},
            r"`overrides`: 0 cannot have 3 slice\(s\): they must divide its input ch",
        ),
        (
            {"3": {"keep_ratio": 1e-3}},
            r"`overrides`: 3 cannot be as small as keep_ratio=0\.001; its smallest form takes",
        ),
        (
            {"3": {"rank": 2}, "type:Linear": "dense"},
            r"`overrides` say different things of 3: '3' and 'type:Linear' both match it",
        ),
    ],
)
@pytest.mark.parametrize("look", [analyze, survey])
def test_what_cannot_be_is_refused_with_a_weight_and_without(look, overrides, text):
    with pytest.raises(ValueError, match=text):
        look(network(), overrides=overrides)


def test_the_same_said_twice_of_a_layer_is_no_contradiction():
    found = lrc.allocate(network(), 0.6, overrides={"3": {"rank": 2}, "type:Linear": {"rank": 2}})
    assert found.layers["3"].rank == found.layers["4"].rank == 2


def test_a_layer_that_cannot_be_factorized_may_stay_dense_but_have_no_rank():
    model = nn.Sequential(nn.Bilinear(4, 4, 4), nn.Linear(32, 32))
    assert lrc.allocate(model, 0.6, overrides={"0": "dense"}).layers["1"] is not None
    with pytest.raises(ValueError, match="no layer that '0' matches can be factorized: 0: Bilinear is not among"):
        lrc.allocate(model, 0.6, overrides={"0": {"rank": 2}})
    with pytest.raises(ValueError, match="no layer that '1' matches can be factorized: 1: named by `exclude`"):
        analyze(nn.Sequential(*model, nn.Linear(32, 32)), exclude=["1"], overrides={"1": {"rank": 2}})


def test_a_budget_below_what_is_overridden_is_refused_with_the_range():
    with pytest.raises(ValueError, match=r"are in layers that are not factorized or that `overrides` are for"):
        lrc.allocate(network(), 0.1, overrides={"0": {"keep_ratio": 1.0}, "3": "dense"})


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        ("head", TypeError, "`overrides` must map patterns of layers to 'dense', .* got 'head'"),
        ({0: "dense"}, TypeError, "`overrides` must map patterns"),
        ({"a": "sparse"}, ValueError, r"`overrides`, 'a': must be 'dense', \{'keep_ratio': 0\.5\} or .* got 'sparse'"),
        ({"a": {"rank": 2, "keep_ratio": 0.5}}, ValueError, "`overrides`, 'a': must be 'dense'"),
        ({"a": {"num_slices": 2}}, ValueError, "`overrides`, 'a': must be 'dense'"),
        ({"a": {"rank": 0}}, ValueError, "`overrides`, 'a': `rank` must be a whole number from 1, got 0"),
        ({"a": {"rank": 2.5}}, ValueError, "`overrides`, 'a': `rank` must be a whole number from 1, got 2.5"),
        ({"a": {"rank": 2, "num_slices": True}}, ValueError, "`num_slices` must be a whole number from 1, got True"),
        ({"a": {"keep_ratio": 0}}, ValueError, r"`overrides`, 'a': `keep_ratio` must be a number in \(0, 1\], got 0"),
        ({"a": {"keep_ratio": "half"}}, ValueError, r"`keep_ratio` must be a number in \(0, 1\], got 'half'"),
        ({"a": {"rank": 2, "folding": "none"}}, ValueError, "`overrides`, 'a': `folding` must be one of"),
        ({"place:top": "dense"}, ValueError, "`overrides`: a place must be 'place:first' or 'place:last'"),
    ],
)
def test_what_is_no_override_is_refused_before_a_model_is_seen(overrides, kind, text):
    with pytest.raises(kind, match=text):
        read_overrides(overrides)
    with pytest.raises(kind, match=text):
        lrc.LowRankCompression(0.5, overrides=overrides)


@pytest.mark.parametrize("slices", [[], [0], ["2"], 4, "1"], ids=repr)
def test_slices_that_are_none_are_refused(slices):
    with pytest.raises(ValueError, match="`slices` must be a list of whole numbers from 1"):
        lrc.ALDS(slices=slices)


def test_only_the_numbers_of_slices_that_are_allowed_are_tried():
    model, method = network(), lrc.ALDS(slices=[2, 8])
    layers = analyze(model, method).layers
    assert {one.num_slices for layer in layers.values() for one in layer.candidates} == {2, 8}
    allocation = lrc.allocate(model, 0.5, method=method)
    assert allocation.factorized and allocation.method["slices"] == [2, 8]
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    skipped = lrc.allocate(model, 0.95, method=lrc.ALDS(slices=[3])).skipped
    assert skipped["0"] == "none of the numbers of slices that are allowed divides its 8 input channels"
    assert "slices" not in lrc.ALDS().to_dict()


def test_slices_whose_ranks_cannot_be_multiples_are_told_so():
    """4 slices divide the channels, and each has a number of them that is no multiple of 3."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 64))
    skipped = lrc.allocate(model, 0.95, method=lrc.ALDS(slices=[4], rank_multiple=3)).skipped
    assert set(skipped) == {"0", "1"}
    assert (
        skipped["0"] == "ranks cannot be multiples of 3: each slice's input channels must be, and are 16 with 4 slices"
    )


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_a_rank_multiple_holds_for_what_is_built(multiple):
    model = network()
    lrc.factorize_(model, lrc.allocate(model, 0.6, method=lrc.ALDS("frobenius", "sum", rank_multiple=multiple)))
    made = [one for one in model.modules() if isinstance(one, lrc.layers.FactorizedLayer)]
    assert made
    for layer in made:
        geometry = layer.geometry(layer)
        inputs = geometry.in_channels // geometry.groups // layer.num_slices
        assert layer.rank % multiple == 0
        assert layer.num_slices == 1 or inputs % multiple == 0


def low_rank():
    """A network whose widest layer is of rank 2, so that errors at hand say nothing of costs."""
    model = network()
    with torch.no_grad():
        model[3].weight.copy_(torch.randn(48, 2) @ torch.randn(2, 64))
    return model


@pytest.mark.parametrize("make", [network, low_rank])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9, 0.999, 1.0])
def test_what_passes_before_the_training_passes_at_the_cut(make, ratio):
    """Whatever the weights are by then: a fraction counts as spent in full."""
    pins = {"3": {"keep_ratio": ratio}}
    promised, real = survey(make(), overrides=pins), analyze(make(), overrides=pins)
    assert real.smallest_cost <= promised.smallest_cost
    least = promised.smallest_cost / promised.dense_cost
    assert real.allocate(least).cost <= least * real.dense_cost * (1 + 1e-9)
    assert promised.pinned.keys() == real.pinned.keys()


@pytest.mark.parametrize("unit", ["activation_memory", "multiply_adds"])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_so_it_does_in_each_of_several_units(unit, ratio):
    model, pins = network(), {"0": {"keep_ratio": ratio}, "3": {"keep_ratio": ratio}}
    seen = observe(model, torch.zeros(4, 8, 6, 5), activations=True)
    prices, method = [Prices("parameters"), Prices(unit, seen)], lrc.ALDS(foldings=list(FOLDINGS))
    promised, real = (look(model, method, prices=prices, overrides=pins) for look in (survey, analyze))
    for one in ("parameters", unit):
        assert real.smallest_in(one) <= promised.smallest_in(one)


def test_layers_of_a_pattern_that_are_too_small_for_any_form_are_passed_over():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 1))
    allocation = lrc.allocate(model, 0.8, overrides={"type:Conv2d": {"keep_ratio": 0.7}})
    assert set(allocation.factorized) == {"1", "2"} and "no rank costs less" in allocation.skipped["0"]
    with pytest.raises(ValueError, match=r"`overrides`: '0': no rank of 0 costs less than the dense layer"):
        lrc.allocate(model, 0.8, overrides={"0": {"keep_ratio": 0.5}})
    with pytest.raises(ValueError, match=r"`overrides`: '0': no rank of 0 costs less than the dense layer"):
        lrc.allocate(model, 0.8, overrides={"0": {"rank": 1}})
    assert lrc.allocate(model, 0.8, overrides={"0": {"keep_ratio": 1.0}}).cost <= 0.8 * 5000


@pytest.mark.parametrize("look", [analyze, survey])
def test_an_override_of_a_layer_that_is_left_out_is_refused_with_the_reason(look):
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"'0' is for 0, which is left out: .*embeddings"):
        look(model, overrides={"0": {"rank": 2}})
    assert "0" in look(model, overrides={"0": {"rank": 2}}, embeddings=True).pinned
    with pytest.raises(ValueError, match="no layer that 'place:last' matches can be factorized: 2: named by `exclude`"):
        look(model, exclude=["2"], overrides={"place:last": {"rank": 2}})


def test_a_layer_whose_weights_are_zero_for_now_is_passed_over_at_the_cut():
    model = network()
    nn.init.zeros_(model[3].weight)
    assert "3" in survey(model, overrides={"3": {"rank": 2}}).pinned
    allocation = lrc.allocate(model, 0.9, overrides={"3": {"rank": 2}})
    assert "all its weights are zero" in allocation.skipped["3"]


def test_a_rank_that_gains_in_one_unit_counts_in_the_others_as_it_is():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=4, bias=False), nn.Conv2d(16, 64, 1))
    seen = observe(model, torch.zeros(1, 16, 4, 4))
    pins = {"0": {"rank": 15, "folding": "kernel_in_decoder"}}
    units = [Prices("multiply_adds", seen), Prices("parameters"), Prices("bytes")]
    found = survey(model, prices=units, overrides=pins)
    assert found.pinned["0"][1] == 15 and found.smallest_in("parameters") > 0
    with pytest.raises(ValueError, match="`folding` must be one of"):
        read_overrides({"0": {"rank": 2, "folding": ["kernel_in_encoder"]}})
