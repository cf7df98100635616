"""Effects: what the error of each layer does to the outputs, with the model as it was."""

from math import sqrt

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.calibration.collect import collect_moments
from lr_callback.calibration.effects import measure_effects
from lr_callback.mathematics.importance import Importance
from tests.unit.common.test_processes import on_ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(256, 40)
    )


def images(seed=0, count=100):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


class Branches(nn.Module):
    """Outputs that are the sum of two layers, one of which counts ten times as much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, features):
        return 10 * self.loud(features) + self.quiet(features)


def test_a_weight_is_the_root_of_what_a_layer_cut_alone_does_to_the_outputs():
    model, batches = network().eval(), [images(seed) for seed in range(2)]
    found = measure_effects(model, batches, lrc.ALDS("frobenius"))
    with torch.no_grad():
        dense = torch.cat([model(one) for one in batches])
    costs = {"0": (3 * 16 * 9 + 16, 3 * 9 + 16, 16), "5": (256 * 40 + 40, 256 + 40, 40)}
    for name, (cost, per_rank, bias) in costs.items():
        layer = model.get_submodule(name)
        rank = int((0.3 * cost - bias) // per_rank)
        left, values, right = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        weight = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(weight.shape))
            changed = torch.cat([model(one) for one in batches]) - dense
            layer.weight.copy_(weight)
        error = (values[rank:].norm() / values.norm()).item()
        effect = (changed.double().var() / dense.double().var()).item()
        assert found[name].weight == pytest.approx(sqrt(effect / error**2), rel=1e-4)


def test_the_model_and_the_random_numbers_stay_as_they_were():
    model = network().train()
    model[0].requires_grad_(False)
    handle = model[5].register_forward_hook(lambda layer, inputs, outputs: 2 * outputs)
    layers, before = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = measure_effects(model, [images()])
    assert list(model.modules()) == layers and all(one.training for one in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and not model[0].weight.requires_grad
    assert len(model[5]._forward_hooks) == 1 and not model[0]._forward_hooks
    assert measure_effects(model, [images()]) == first
    handle.remove()
    # Twice the scores are twice the changes, too.
    assert measure_effects(model, [images()])["5"].weight == pytest.approx(first["5"].weight, rel=1e-6)


@pytest.mark.parametrize("power", [2, 4])
def test_the_objective_keeps_more_of_the_layer_that_counts_more_and_records_the_weights(power):
    model, batch = Branches(), torch.randn(200, 24)
    moments = collect_moments(model, [batch])
    known = measure_effects(model, [batch], lrc.ALDS("activation"), moments)
    assert torch.equal(known["loud"].inputs, moments["loud"].inputs)
    # Of the variance of the outputs the loud one makes hundred times as much: the root of that is the ratio.
    assert known["loud"].weight / known["quiet"].weight == pytest.approx(10, rel=0.2)
    found = {}
    for objective in ("sum", "loss"):
        method = lrc.ALDS("activation", objective, power=power)
        allocation = lrc.allocate(model, 0.6, method=method, importance=known)
        report = lrc.factorize_(Branches(), allocation, importance=known)
        assert report.parameters_after <= allocation.budget
        layers = [allocation.layers[name] for name in ("loud", "quiet")]
        found[objective] = [0.0 if one is None else one.relative_error for one in layers]
        assert allocation.gap == 0
        assert allocation.weights == ({name: known[name].weight for name in known} if objective == "loss" else {})
        assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    assert found["loss"][0] < min(found["sum"]) < max(found["sum"]) < found["loss"][1]


@pytest.mark.parametrize(
    ("kind", "total", "steps"), [(list, 6, range(6)), (iter, 4, (0, 1, 2, 3, 2, 3))], ids=["counted", "not counted"]
)
def test_progress_rises_through_the_decompositions_and_the_runs_on_each_batch(kind, total, steps):
    told, model = [], network().eval()
    batches = [images(seed, count=4) for seed in range(2)]
    measure_effects(model, kind(batches), progress=lambda *given: told.append(given))
    assert told == [(done, total, name) for done, name in zip(steps, ["0", "5"] * 3, strict=True)]


def test_errors_of_the_weights_alone_take_weights_of_layers_too():
    model, batch = Branches(), torch.randn(200, 24)
    known = measure_effects(model, [batch], lrc.ALDS("frobenius"))
    allocation = lrc.allocate(model, 0.6, method=lrc.ALDS("frobenius", "loss"), importance=known)
    assert allocation.layers["quiet"].relative_error > 0.1
    lrc.factorize_(model, allocation, importance=known)
    assert isinstance(model.quiet, lrc.FactorizedLinear)


def test_factorized_layers_are_measured_against_what_they_are_now():
    model, batch = Branches(), torch.randn(200, 24)
    lrc.factorize_(model, lrc.allocate(model, 0.9))
    known = measure_effects(model, [batch], lrc.ALDS("frobenius"))
    assert known["loud"].weight / known["quiet"].weight == pytest.approx(10, rel=0.3)
    lrc.factorize_(model, lrc.allocate(model, 0.5, method=lrc.ALDS("frobenius", "loss"), importance=known))


def test_a_layer_that_is_not_called_is_told_of_and_counts_as_the_median():
    model = Branches()
    model.third, model.spare = nn.Linear(24, 24), nn.Linear(30, 30)
    model.forward = lambda features: 10 * model.loud(features) + 3 * model.third(features) + model.quiet(features)
    with pytest.warns(
        UserWarning, match=r"The effects of 1 layer\(s\) are not measured.*: spare. They count .* median"
    ):
        known = measure_effects(model, [torch.randn(50, 24)])
    assert set(known) == {"loud", "quiet", "third"}
    with pytest.warns(UserWarning, match=r"The importance of 1 layer\(s\) is not known"):
        allocation = lrc.allocate(model, 0.5, method=lrc.ALDS(objective="loss"), importance=known)
    assert allocation.weights["spare"] == known["third"].weight


def test_a_layer_without_any_effect_is_cut_first_and_no_further_than_it_must():
    model = Branches()
    model.forward = lambda features: model.loud(features) + 0 * model.quiet(features)
    known = measure_effects(model, [torch.randn(50, 24)])
    assert known["quiet"].weight == 0
    method = lrc.ALDS(objective="loss")
    half = lrc.allocate(model, 0.55, method=method, importance=known)
    assert half.layers["loud"] is None and half.layers["quiet"].rank == 1
    most = lrc.allocate(model, 0.95, method=method, importance=known)
    assert most.layers["quiet"].relative_error < half.layers["quiet"].relative_error
    nothing = {name: Importance(weight=0.0) for name in known}
    assert set(lrc.allocate(model, 0.5, method=method, importance=nothing).weights.values()) == {1.0}


def test_layers_that_are_too_small_or_left_out_have_none():
    model = network()
    model.append(nn.Linear(40, 1))
    whole = measure_effects(model, [images()])
    assert {name: one.weight is None for name, one in whole.items()} == {"0": False, "5": False, "6": True}
    assert set(measure_effects(model, [images()], exclude="5")) == {"0", "6"}
    assert measure_effects(model, [images()], include="5") == {"5": whole["5"]}


def test_a_layer_that_cannot_be_as_small_is_as_small_as_it_can_be_and_one_that_does_not_err_has_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 30), nn.Linear(30, 30))
    with torch.no_grad():
        model[1].weight.copy_(torch.outer(torch.randn(30), torch.randn(5)))
    known = measure_effects(model, [torch.randn(50, 5)])
    assert known["0"].weight > 0 and known["2"].weight > 0 and known["1"].weight is None
    allocation = lrc.allocate(model, 0.7, method=lrc.ALDS(objective="loss"), importance=known)
    assert allocation.weights["1"] == (known["0"].weight + known["2"].weight) / 2
    assert allocation.layers["1"].rank == 1


def test_several_processes_measure_as_one_with_all_batches(tmp_path):
    batches = [images(0), images(1, 60), images(2, 30)]

    def work(processes):
        own = batches[:2] if processes.rank == 0 else batches[2:]
        return {name: one.weight for name, one in measure_effects(network(), own, processes=processes).items()}

    found = on_ranks(2, tmp_path, work)
    whole = measure_effects(network(), batches)
    assert found[0] == found[1]
    assert found[0] == {name: pytest.approx(one.weight, rel=1e-9) for name, one in whole.items()}


@pytest.mark.situation("Repair", "layers weighed by their effect, without their weights", "refused")
def test_the_objective_without_weights_is_refused_and_weights_without_it():
    model, batch = Branches(), torch.randn(200, 24)
    moments = collect_moments(model, [batch])
    for error, known in (("slice", None), ("activation", moments)):
        with pytest.raises(
            ValueError, match=r"objective='loss' weighs .*`measure_effects\(model, batches, method, imp"
        ):
            lrc.allocate(model, 0.5, method=lrc.ALDS(error, "loss"), importance=known)
    known = measure_effects(model, [batch])
    with pytest.raises(ValueError, match=r"`importance` is for the errors activation, .*; error='slice' is of the wei"):
        lrc.allocate(model, 0.5, importance=known)
    with pytest.raises(ValueError, match=r"error='activation' is weighted: `importance` must be .* got none"):
        measure_effects(model, [batch], lrc.ALDS("activation"))
    for weight in (-1.0, float("nan"), float("inf"), "1", torch.ones(1)):
        with pytest.raises(ValueError, match=r"`importance.weight` must be a finite number, at least 0, got"):
            Importance(weight=weight)


def test_what_cannot_be_measured_is_refused():
    model, batch = network(), images()
    with pytest.raises(ValueError, match="`batches` must hold at least one calibration batch, got none"):
        measure_effects(model, [])
    for share in (0, 1, -0.5, "0.3", True):
        with pytest.raises(ValueError, match=r"`share` must be a number in \(0, 1\), .* got "):
            measure_effects(model, [batch], share=share)
    with pytest.raises(ValueError, match="must return them, got 1 tensor"):
        measure_effects(model, [batch], forward=lambda one: model(one).argmax(1))
    with pytest.raises(ValueError, match="must vary, they are all the same"):
        measure_effects(model, [batch], forward=lambda one: model(one) * 0 + 3)
    with pytest.raises(ValueError, match="batches must be finite, found NaN or infinity"):
        measure_effects(model, [batch * torch.nan])
    with pytest.raises(ValueError, match=r"must be of the same shapes whether it is cut or not"):
        measure_effects(model, [batch], forward=lambda one: (scores := model(one))[scores > scores.mean() + 0.1])
    assert isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(6, 12, 2, stride=2), nn.ConvTranspose2d(12, 6, 2, groups=2)])
def test_the_constant_error_of_a_transposed_layer_is_made_up_for(layer):
    torch.manual_seed(0)
    model, batches = nn.Sequential(layer), [torch.randn(64, layer.in_channels, 3, 3) + 1]
    known = measure_effects(model, batches, lrc.ALDS("activation", "loss"), collect_moments(model, batches))
    assert known["0"].weight > 0


def test_of_very_many_layers_the_largest_are_measured_and_the_others_get_the_median(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(24, 24 + 8 * index), nn.Linear(24 + 8 * index, 24)) for index in range(3)]
    )
    batches = [torch.randn(100, 24)]
    whole = measure_effects(model, batches)
    monkeypatch.setattr("lr_callback.calibration.effects.MOST_MEASURED", 4)
    some = measure_effects(model, batches)
    assert list(some) == list(whole)
    measured = [name for name, one in some.items() if one.weight is not None]
    assert measured == ["1.0", "1.1", "2.0", "2.1"]
    assert all(some[name].weight == whole[name].weight for name in measured)
    weights = lrc.analyze(model, lrc.ALDS("frobenius", "loss"), importance=some).allocate(0.5).weights
    middle = sorted(weights[name] for name in measured)
    assert middle[0] <= weights["0.0"] == weights["0.1"] <= middle[-1]


class Walked(nn.Sequential):
    """Layers one after the other, and how often all of them are gone through."""

    walks = 0

    def named_modules(self, *arguments, **named):
        self.walks += 1
        return super().named_modules(*arguments, **named)


def test_a_model_is_gone_through_as_often_however_many_layers_it_has():
    torch.manual_seed(0)
    models = [Walked(*(nn.Linear(16, 16) for _ in range(layers))) for layers in (3, 30)]
    for model in models:
        measured = measure_effects(model, [torch.randn(64, 16)] * 2)
        assert len(measured) == len(model) and all(one.weight > 0 for one in measured.values())
    assert models[0].walks == models[1].walks > 0
