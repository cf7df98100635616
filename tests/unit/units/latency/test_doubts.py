"""A network that is measured on a machine that stands still: by runs that sleep, and by a file with false times."""

import json
from importlib import import_module
from time import sleep

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.model.observe import observe
from lr_callback.units.latency import LayerInput, NoisyClockError, measure
from lr_callback.units.latency import trust as trust_file
from lr_callback.units.latency.files import folder

METHOD = lrc.ALDS(slices=[1])
FAR = 20.0
"""A part by which times never differ by chance while other tests run."""


@pytest.fixture(autouse=True)
def far_apart_only(own_cache, any_clock, monkeypatch):
    """Let only such times be doubted as differ more than they do by chance."""
    for name in ("EXCESS_SAID", "DRIFT_SAID"):
        monkeypatch.setattr(trust_file, name, FAR)
    monkeypatch.setattr("lr_callback.units.latency.whole._SECONDS", 0.0)  # five runs, no more
    monkeypatch.setattr(trust_file, "PATIENCE", 1e6)
    monkeypatch.setattr(trust_file, "PAUSE", 0.0)


def network():
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


def kept():
    (file,) = folder().iterdir()
    return json.loads(file.read_text("utf-8"))["times"]


def measured(model, run):
    """Measure a network whose runs are given."""
    layers = {"0": model[0], "2": model[2]}
    call = LayerInput((64, 256), torch.float32)
    return measure(model, layers, {"0": [call], "2": [call]}, run, {})


def test_a_machine_that_stands_still_at_first_is_measured_again(monkeypatch):
    """Steadily, for as long as the model is timed at first."""
    model, images, naps = network(), torch.randn(64, 256), iter([0.4] * 7)

    def run():
        sleep(next(naps, 0))
        model(images)

    ends = iter([1000])
    monkeypatch.setattr(import_module("lr_callback.units.latency.measure"), "once", lambda *_: next(ends, 10**12))
    found = measured(model, run)
    assert found.dense < 200_000_000
    assert next(naps, None) is None
    assert any(name.startswith("model") for name in kept())


def test_times_that_are_doubted_to_the_end_are_told_of_and_not_kept(monkeypatch):
    """A run at the end is fast each time: what was measured is of another machine, so to speak."""
    monkeypatch.setattr(import_module("lr_callback.units.latency.measure"), "once", lambda *_: 1000)
    with pytest.warns(UserWarning, match=r"Latency: the model takes .* ms at first, and 0\.001 ms at the end"):
        measured(network(), lambda: sleep(0.01))
    assert not any(name.startswith("model") for name in kept())
    monkeypatch.setattr(trust_file, "SPREAD_REFUSED", FAR)
    with pytest.raises(NoisyClockError, match="too noisy to choose by: the model takes"):
        measured(network(), lambda: sleep(0.01))


def test_false_times_in_a_file_are_found_out_and_measured_again():
    model, images = network(), torch.randn(64, 256)
    first = observe(model, images, METHOD).latencies
    (file,) = folder().iterdir()
    written = json.loads(file.read_text("utf-8"))
    for forms in written["times"].values():
        for form, (nanoseconds, spread) in forms.items():
            forms[form] = [nanoseconds if form.startswith("share") else 1000 * nanoseconds, spread]
    file.write_text(json.dumps(written), encoding="utf-8")
    again = observe(model, images, METHOD).latencies
    assert again.dense < FAR * first.dense
    assert written["times"].keys() == kept().keys()
    assert all(forms != written["times"][name] for name, forms in kept().items())


def test_a_layer_in_a_file_that_contradicts_its_model_is_measured_again():
    model, images = network(), torch.randn(64, 256)
    observe(model, images, METHOD)
    (file,) = folder().iterdir()
    written = json.loads(file.read_text("utf-8"))
    name = next(name for name in written["times"] if "out_features=256" in name)
    written["times"][name]["dense"][0] *= 1000
    file.write_text(json.dumps(written), encoding="utf-8")
    observe(model, images, METHOD)
    assert kept()[name]["dense"][0] < written["times"][name]["dense"][0] / FAR


class Once(nn.Module):
    """Calls its layers in the first run only: later they take longer than the whole model."""

    def __init__(self):
        super().__init__()
        self.network, self.runs = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)), 0

    def forward(self, images):
        self.runs += 1
        return self.network(images) if self.runs == 1 else images


def test_layers_that_take_longer_than_their_model_are_told_of():
    with pytest.warns(
        UserWarning, match="the layers take .* ms by themselves, and the whole model .* a part of it; tim"
    ):
        observe(Once(), torch.randn(64, 2048), METHOD)
    assert not any(name.startswith("model") for name in kept())
