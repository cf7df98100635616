"""Layers and models, timed for real; what is decided by times is tested with made-up ones."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze, to_time
from lr_callback.model.find import find_layers
from lr_callback.model.observe import Observation, observe
from lr_callback.model.pricing import Prices
from lr_callback.units.latency import Curve, Latencies, LayerInput, LayerTimes, device_facts
from lr_callback.units.latency.bench import Bench, form_of
from lr_callback.units.latency.files import Times, folder

pytestmark = pytest.mark.usefixtures("own_cache", "any_clock")

CPU = torch.device("cpu")
FOLDING = "kernel_in_encoder"
METHOD = lrc.ALDS(slices=[1, 2])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 10))


def known(**layers: LayerTimes) -> Observation:
    """Return an observation of the network with made-up times."""
    times = Latencies(1000, {name[1:]: one for name, one in layers.items()}, 0.01, device_facts(CPU))
    return replace(observe(network(), torch.randn(8, 512)), latencies=times)


FAST = LayerTimes(5000, {(FOLDING, 1): Curve(16, {16: 400, 64: 1600})})
SLOW = LayerTimes(5000)
MADE_UP = {"_0": FAST, "_2": SLOW, "_3": SLOW}


def test_a_model_is_its_layers_and_the_rest():
    found = observe(network(), torch.randn(32, 512), METHOD).latencies
    assert set(found.layers) == {"0", "2", "3"}
    assert found.rest >= 0
    assert found.dense == found.rest + sum(layer.dense for layer in found.layers.values())
    assert set(found.layers["0"].curves) <= {(FOLDING, 1), (FOLDING, 2)}
    assert (FOLDING, 1) in found.layers["0"].curves  # an eighth of the products, at rank 32
    assert found.device == device_facts(CPU)
    assert Latencies.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_factorized_model_is_told_as_if_it_were_dense():
    model = network()
    lrc.factorize_(model, lrc.allocate(model, 0.3))
    found = observe(model, torch.randn(32, 512), METHOD).latencies
    assert found.dense > found.rest + found.layers["2"].dense > 0


def test_a_measurement_leaves_model_and_random_state_alone():
    model, images = nn.Sequential(network(), nn.BatchNorm1d(10), nn.Dropout()), torch.randn(8, 512)
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    observe(model, images, METHOD)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_on_the_disk_is_not_measured_again():
    model, images = network(), torch.randn(8, 512)
    observe(model, images, METHOD)
    (file,) = folder().iterdir()
    written = json.loads(file.read_text("utf-8"))
    for forms in written["times"].values():
        for form in forms:
            forms[form] = [7000 if form in ("dense", "whole") else 10**9, 0.01]
    file.write_text(json.dumps(written), encoding="utf-8")
    found = observe(model, images, METHOD).latencies
    assert not any(layer.curves for layer in found.layers.values())
    assert json.loads(file.read_text("utf-8")) == written


def test_a_second_run_knows_all_of_the_first():
    """The model's own time, too: a ratio that was found in one run is the same in the next."""
    model, images = network(), torch.randn(8, 512)
    first, second = (observe(model, images, METHOD).latencies for _ in range(2))
    assert (first.rest, first.layers) == (second.rest, second.layers)


def test_foldings_are_priced_under_the_names_that_they_are_timed_under():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, padding=3))
    method = lrc.ALDS(slices=[1], foldings=["kernel_in_encoder", "kernel_in_decoder"])
    found = observe(model, torch.randn(2, 8, 5, 5), method)
    priced = Prices("latency", found).of_layer("0", model[0])
    assert set(found.latencies.layers["0"].curves) <= {(name, 1) for name in priced.distinct_foldings(method.foldings)}


@pytest.mark.parametrize("budget", [{"latency": 0.99}, {"parameters": 0.99, "latency": 0.99}])
def test_a_rank_of_ones_own_is_measured_and_kept(budget):
    """At 7 of 512 no block would be chosen, and much is saved."""
    overrides = {"0": {"rank": 7, "num_slices": 2, "folding": "kernel_in_decoder"}}
    model = network()
    found = lrc.allocate(model, budget=budget, method=METHOD, overrides=overrides, example_input=torch.randn(64, 512))
    chosen = found.layers["0"]
    assert (chosen.folding, chosen.num_slices, chosen.rank) == ("kernel_in_decoder", 2, 7)
    assert Times(CPU).get(Bench(CPU).name(model[0], LayerInput((64, 512), torch.float32)), "kernel_in_decoder/2/7")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ({"rank": 7, "num_slices": 3}, r"`overrides`: 0 cannot have 3 slice\(s\): they must divide its input channels"),
        ({"rank": 600}, r"`overrides`: '0': no rank of 0 costs less than the dense layer"),
    ],
)
def test_a_rank_that_a_layer_cannot_have_is_refused_where_time_is_a_budget(override, match):
    options = {"cost": "latency", "method": METHOD, "example_input": torch.randn(8, 512)}
    with pytest.raises(ValueError, match=match):
        lrc.allocate(network(), 0.9, overrides={"0": override}, **options)


def test_only_what_may_be_factorized_is_measured_and_more_when_it_may():
    model, images = network(), torch.randn(64, 512)
    few = observe(model, images, to_time(model, METHOD, exclude=["2"], overrides={"3": "dense"})).latencies
    assert list(few.layers) == ["0"]
    assert few.rest > 0
    assert few.lacks(to_time(model, METHOD)) == ["2", "3"]
    assert few.lacks(to_time(model, METHOD, include=["0"], overrides={"0": {"rank": 7}})) == ["0"]
    assert not few.lacks(to_time(model, METHOD, include=["0"]))
    first = Times(CPU).get(Bench(CPU).name(model[0], LayerInput((64, 512), torch.float32)), "dense")
    more = observe(model, images, METHOD).latencies
    assert list(more.layers) == ["0", "2", "3"]
    assert Times(CPU).get(Bench(CPU).name(model[0], LayerInput((64, 512), torch.float32)), "dense") == first


def test_overrides_by_ratio_and_dense_ones_go_with_time():
    prices = Prices("latency", known(**MADE_UP))
    found = analyze(network(), METHOD, prices=prices, overrides={"0": {"keep_ratio": 0.2}, "3": "dense"}).allocate(0.9)
    assert found.layers["0"].cost <= 0.2 * 5000


def test_layers_alike_share_their_times():
    bench, call = Bench(CPU), LayerInput((4, 16), torch.float32)
    names = {bench.name(nn.Linear(16, 8), call), bench.name(nn.Linear(16, 8), call)}
    assert len(names) == 1
    for other in (nn.Linear(16, 8, bias=False), nn.Linear(16, 9), nn.Linear(16, 8, dtype=torch.float64)):
        assert bench.name(other, call) not in names
    assert bench.name(nn.Linear(16, 8), LayerInput((5, 16), torch.float32)) not in names


def test_dense_and_factorized_layers_have_one_name():
    bench, call = Bench(CPU), LayerInput((1, 8, 9, 9), torch.float32)
    for layer in (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)):
        model = nn.Sequential(layer)
        dense = bench.name(model[0], call)
        lrc.factorize_(model, lrc.allocate(model, 0.5))
        assert form_of(model[0]) is not None
        assert bench.name(model[0], call) == dense


def test_an_embedding_is_timed_with_indices():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
    found = observe(model, torch.zeros(3, 4, dtype=torch.int64), METHOD).latencies
    assert found.layers["0"].dense > 0


def test_only_what_is_faster_is_factorized():
    analysis = analyze(network(), METHOD, prices=Prices("latency", known(**MADE_UP)))
    assert (analysis.dense_cost, analysis.smallest_cost) == (16_000, 11_400)
    allocation = analysis.allocate(0.8)
    assert set(allocation.factorized) == {"0"}
    assert allocation.layers["0"].rank == 64
    assert allocation.layers["0"].cost == 1600
    assert analysis.skipped["2"] == "no form of it was measured to be faster than the dense layer"
    assert "16 -> 13 microseconds (78.8% kept, 80.0% asked)" in allocation.summary()


def test_where_nothing_is_faster_it_is_said_what_to_do():
    with pytest.raises(ValueError, match=r"Nothing to factorize: .*2: no form of it was measured to be") as caught:
        analyze(network(), METHOD, prices=Prices("latency", known(**MADE_UP)), include=["2"])
    assert str(caught.value).endswith(". Ask for a budget in another unit, or measure on a larger batch.")


def test_what_is_slower_is_not_chosen_for_the_sake_of_parameters_either():
    prices = [Prices("parameters"), Prices("latency", known(**MADE_UP))]
    allocation = analyze(network(), METHOD, prices=prices).allocate({"parameters": 0.6, "latency": 0.9})
    assert set(allocation.factorized) == {"0"}
    assert allocation.layers["0"].rank in (16, 32, 48, 64)
    text = (
        r"`budget`: 0\.1 of parameters: the budget must be at least .*\. Raise it; with the same layers each alone can "
        r"go down to 0\.\d+ of parameters, 0\.7125 of latency\. Layers of which no form was measured to be faster stay "
        r"dense\.$"
    )
    with pytest.raises(ValueError, match=text):
        analyze(network(), METHOD, prices=prices).allocate({"parameters": 0.1, "latency": 0.9})


def test_a_budget_out_of_reach_says_what_can_be_reached():
    analysis = analyze(network(), METHOD, prices=Prices("latency", known(**MADE_UP)))
    match = r"at least 11 microseconds, got 8 microseconds\. 11 microseconds are in .* keep_ratio from 0\.7125 to 1"
    with pytest.raises(ValueError, match=match):
        analysis.allocate(0.5)


def test_latency_takes_a_timed_run():
    seen = observe(network(), torch.randn(8, 512))
    with pytest.raises(
        ValueError, match="cost='latency' is measured in a run of the model, and this one was not timed"
    ):
        Prices("latency", seen)
    with pytest.raises(ValueError, match="latency and activation memory are of a run on an example input, got none"):
        lrc.allocate(network(), 0.5, cost="latency")


def test_a_run_without_a_layer_to_factorize_is_refused():
    with pytest.raises(ValueError, match="the run must call a layer that can be factorized, and it calls none"):
        observe(nn.Sequential(nn.ReLU()), torch.randn(2, 2), METHOD)


def test_an_allocation_in_time_is_carried_out_and_read_again():
    model, images = network(), torch.randn(64, 512)
    allocation = lrc.allocate(model, 0.9, cost="latency", example_input=images, method=METHOD)
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    lrc.factorize_(model, allocation)
    assert {name for name in find_layers(model).layers} == {"0", "2", "3"}
    assert Times(CPU).path.is_file()


@pytest.mark.parametrize("method", [lrc.UniformRank(), lrc.EnergyThreshold(), lrc.LRank(), METHOD], ids=repr)
def test_every_method_leaves_a_slow_rank_alone(method):
    """Between two fast ranks there is a slow one, which costs more than the dense layer."""
    bumpy = LayerTimes(5000, {(FOLDING, 1): Curve(16, {16: 400, 32: 9000, 48: 1600, 64: 3000})})
    analysis = analyze(network(), method, prices=Prices("latency", known(_0=bumpy, _2=SLOW, _3=SLOW)))
    low, high = analysis.reachable
    for step in range(11):
        for layer in analysis.allocate(low + (high - low) * step / 10).factorized.values():
            assert layer.cost < 5000
            assert layer.relative_error < 2
