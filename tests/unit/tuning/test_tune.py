"""Forms of layers are measured without a change to the model, and given to it all or nothing."""

import re

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback import Factorization, FactorizedConv2d, FactorizedLinear, Tuning, tune, tune_
from lr_callback.layers import FactorizedLayer
from lr_callback.tuning import tune as tune_module
from lr_callback.tuning.forms import forms_of, in_form
from lr_callback.tuning.tuned import LayerForms
from lr_callback.units.latency import Timing

pytestmark = pytest.mark.usefixtures("any_clock")

FORMS = ["as built", "one block", "dense"]
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network():
    """Return a small network with two factorized layers of two slices and rank 2."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 3)
    )
    lrc.factorize_(model, allocation(2, "0", "4"))
    return model


def allocation(num_slices, *names):
    shapes = {name: {"0": (8, 4, 3, 3), "4": (16, 128)}[name] for name in names}
    choice = Factorization("kernel_in_encoder", num_slices, 2, 0.0, 0, 1)
    return lrc.Allocation(dict.fromkeys(shapes, choice), {}, shapes, 0, 1, 0, 1.0)


def choosing(**chosen):
    """Return a tuning of times with which the layers of the network are chosen in some forms."""
    layers = {
        name: LayerForms("kernel_in_encoder", 2, 2, {one: Timing(50 if one == form else 100, 0.0) for one in FORMS})
        for name, form in {"0": "as built", "4": "as built", **{key[1:]: form for key, form in chosen.items()}}.items()
    }
    return Tuning(layers, {"as built": Timing(9000, 0.0), "tuned": Timing(8000, 0.0)})


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def state(model):
    named = model.state_dict(keep_vars=True).items()
    return {name: (id(one), one.data_ptr(), one.stride(), one.clone()) for name, one in named}


def is_same(one, other):
    return list(one) == list(other) and all(
        one[name][:3] == other[name][:3] and torch.equal(one[name][3], other[name][3]) for name in one
    )


def test_to_tune_changes_nothing():
    model, told = network().train(), []
    before, modules, random = state(model), list(model.modules()), torch.get_rng_state()
    tuning = tune(model, IMAGES, progress=lambda *one: told.append(one))
    assert told == [(0, 2, "0"), (1, 2, "4")]
    assert is_same(state(model), before)
    assert list(model.modules()) == modules
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: list(layer.times) for name, layer in tuning.layers.items()} == {"0": FORMS, "4": FORMS}
    assert {"as built", "channels_last", "pointwise"} <= set(tuning.whole)
    assert set(tuning.whole) <= {"as built", "tuned", "channels_last", "pointwise"}
    assert tuning.inputs == ("2x4x6x6 float32",)
    assert tuning.device["type"] == "cpu"
    assert Tuning.from_json(tuning.to_json()) == tuning


def test_an_interrupted_measurement_changes_nothing(monkeypatch):
    model = network()
    before, modules, done = state(model), list(model.modules()), []

    def stopped(*_):
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return Timing(100, 0.0)

    monkeypatch.setattr(
        "lr_callback.tuning.timed_forms.timed", stopped
    )  # in channels_last, or with the tuned layers in place
    with pytest.raises(KeyboardInterrupt):
        tune(model, IMAGES)
    assert is_same(state(model), before)
    assert list(model.modules()) == modules


def test_an_interrupted_measurement_keeps_the_times_that_it_has(own_cache):
    def stop_at_the_second(done, total, name):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(network(), IMAGES, progress=stop_at_the_second)
    (file,) = (own_cache / "lr_callback" / "latency").iterdir()
    assert "dense" in file.read_text("utf-8")


def test_channels_last_is_timed_only_where_it_is_another_format():
    model = nn.Sequential(network()[4:])
    assert "channels_last" not in tune(model, torch.zeros(2, 128)).whole
    assert "channels_last" not in tune(network().to(memory_format=torch.channels_last), IMAGES).whole


def test_pointwise_is_timed_only_where_it_changes_the_model():
    assert "pointwise" not in tune(nn.Sequential(*network()[:4]), IMAGES).whole


def test_linear_layers_become_pointwise_where_that_is_asked_for():
    model = network()
    expected = outputs(model)
    tune_(model, choosing(_4="one block"), pointwise=True)
    assert lrc.pointwise_(model) == ()
    assert torch.allclose(outputs(model), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_swapped_in_and_restores_from_a_checkpoint(form, tmp_path):
    model = network()
    expected = outputs(model)
    report = tune_(model, choosing(_0=form, _4=form))
    names = () if form == "as built" else ("0", "4")
    assert (report.densified if form == "dense" else report.factorized) == names
    kinds = {"dense": (nn.Conv2d, nn.Linear)}.get(form, (FactorizedConv2d, FactorizedLinear))
    assert (type(model[0]), type(model[4])) == kinds
    if form == "one block":
        assert [(layer.num_slices, layer.rank) for layer in (model[0], model[4])] == [(1, 4), (1, 4)]
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    for fresh in (network(), lrc.densify_(other := network()) and other):
        lrc.restore_(fresh, tmp_path / "tuned.pt")
        assert str(fresh) == str(model)
        assert torch.equal(outputs(fresh), outputs(model))


def test_done_twice_it_is_done_once():
    model, tuning = network(), choosing(_0="one block", _4="dense")
    tune_(model, tuning)
    before = state(model)
    report = tune_(model, tuning)
    assert (report.factorized, report.densified) == ((), ())
    assert is_same(state(model), before)


def test_what_a_layer_has_is_taken_over():
    model, seen = network().eval(), []
    bias = model[4].bias
    model[4].register_forward_hook(lambda *_: seen.append("called"))
    model[4].encoder.weight.requires_grad_(False)
    tune_(model, choosing(_4="one block"))
    outputs(model)
    assert seen == ["called"]
    assert model[4].bias is bias
    assert not model[4].encoder.weight.requires_grad
    assert not model[4].training


def test_a_shared_layer_stays_shared():
    model = network()
    model.append(nn.ModuleDict({"again": model[4]}))
    tune_(model, choosing(_4="dense"))
    assert isinstance(model[4], nn.Linear)
    assert model[6]["again"] is model[4]


def test_channels_last_if_asked():
    model, expected = network(), outputs(network())
    tune_(model, choosing(_0="one block"), channels_last=True)
    assert model[0].encoder.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    model = network()
    tune_(model, choosing(_0="one block"))
    assert model[0].encoder.weight.is_contiguous()


@pytest.mark.parametrize(("step", "options"), [("lay_out", {"channels_last": True}), ("make_pointwise", {})])
def test_what_fails_on_the_way_is_undone(step, options, monkeypatch):
    model = network()
    before, modules = state(model), [(one, type(one)) for one in model.modules()]
    as_it_is = getattr(tune_module, step)

    def broken(*arguments):
        as_it_is(*arguments)
        raise MemoryError

    monkeypatch.setattr(tune_module, step, broken)
    with pytest.raises(MemoryError):
        tune_(model, choosing(_0="dense"), pointwise=True, **options)
    assert is_same(state(model), before)
    assert [(one, type(one)) for one in model.modules()] == modules


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: model.__setitem__(4, nn.Linear(128, 16)), "found a dense one; measure this model with `tune`"),
        (lambda model: model.__setitem__(4, nn.Identity()), "found no layer that can be replaced"),
        (
            lambda model: lrc.factorize_(model, allocation(4, "4")),
            "4: must be as it was measured, of 2 slices and rank 2, found one of 4 slices and rank 2",
        ),
    ],
)
def test_another_model_than_was_measured_is_refused(change, text):
    model = network()
    change(model)
    before = state(model)
    with pytest.raises(ValueError, match=text):
        tune_(model, choosing(_0="dense", _4="one block"))
    assert is_same(state(model), before)


def test_another_type_than_a_tuning_is_refused():
    with pytest.raises(TypeError, match="`tuning` must be a Tuning, as `tune` returns it, got dict"):
        tune_(network(), choosing().to_dict())


class Part(nn.Module):
    """Calls one of its layers, and holds one outside of its submodules."""

    def __init__(self):
        super().__init__()
        self.layers = network()
        self.held = [self.layers[0]]

    def forward(self, images):
        return self.layers[4](images.flatten(1)[:, :128])


class OnlyHeld(nn.Module):
    """Calls a layer that is held elsewhere, too."""

    def __init__(self):
        super().__init__()
        self.layer = FactorizedLinear(nn.Linear(8, 8), 2, 2)
        self.held = [self.layer]


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        (nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4), "must have a factorized layer, found none in Sequential"),
        (FactorizedLinear(nn.Linear(4, 4), 2, 1), torch.zeros(1, 4), "found none; the model: the model itself is"),
        (OnlyHeld(), torch.zeros(1, 8), "that can be replaced, found none; layer: held by .* too"),
        (network(), None, "`example_input` must be a tensor, .*got NoneType"),
        (
            network(),
            torch.zeros(2, 3),
            r"Sequential must take it, found that inputs of shape \(2, 3\) make a RuntimeEr",
        ),
        (network().to("meta"), IMAGES, "found none; 0: encoder: its weight is on the meta device"),
        (nn.Sequential(network()[4], network()[4].to("meta")), IMAGES, "on a device that holds values"),
    ],
)
def test_refused_with_what_must_hold(model, inputs, text):
    with pytest.raises(ValueError, match=text):
        tune(model, inputs)


def test_layers_on_several_devices_are_refused(monkeypatch):
    model = network()
    places = {model[0]: "cpu", model[4]: "meta"}
    monkeypatch.setattr("lr_callback.tuning.tune.any_weight", lambda layer: torch.empty(1, device=places[layer]))
    with pytest.raises(ValueError, match="must be on one device, found 0 on cpu, 4 on meta; move the model to one"):
        tune(model, IMAGES)


def test_a_run_that_calls_no_factorized_layer_is_refused():
    model = nn.ModuleDict({"one": network(), "other": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=re.escape("must call a factorized layer, found none; one.0: its forward")):
        tune(model, torch.zeros(2, 3), called=model["other"])
    with pytest.raises(ValueError, match="`called`: must be a module of ModuleDict, found another Linear"):
        tune(model, torch.zeros(2, 3), called=nn.Linear(3, 3))


def test_what_is_not_called_or_cannot_be_replaced_is_told_with_its_reason():
    model = nn.ModuleDict({"part": Part(), "more": network()})
    tuning = tune(model, torch.randn(2, 4, 6, 6), called=model["part"])
    assert list(tuning.layers) == ["part.layers.4"]
    assert re.match(r"held by .*", tuning.skipped["part.layers.0"])
    assert tuning.skipped["more.0"] == "its forward is not called on the example input"
    assert "more.0 stays as built: its forward is not called" in str(tuning)


def test_forms_that_a_layer_has():
    assert list(forms_of(FactorizedLinear(nn.Linear(12, 8), 3, 2))) == FORMS
    assert list(forms_of(FactorizedLinear(nn.Linear(12, 8), 1, 2))) == ["as built", "dense"]
    assert list(forms_of(FactorizedLinear(nn.Linear(12, 8), 4, 3))) == ["as built", "dense"]  # 12 > 8
    layer = FactorizedLinear(nn.Linear(12, 8), 1, 2)
    assert in_form(layer, "as built") is layer
    with pytest.raises(ValueError, match=r"must be one of \['as built', 'dense'\] for folding=.*, got 'one block'"):
        in_form(layer, "one block")


def test_the_factors_of_one_block_are_zero_outside_of_the_slices():
    layer = FactorizedLinear(nn.Linear(6, 5), 3, 1)
    made = in_form(layer, "one block")
    assert isinstance(made, FactorizedLayer)
    parts = layer.encoder.weight.split(1)
    assert torch.equal(made.encoder.weight, torch.block_diag(*parts))
    assert torch.equal(made.decoder.weight, layer.decoder.weight)
