"""``lr-callback tune``: times of a checkpoint's model, and its weights in the forms that are chosen."""

import json
import re
import sys
from itertools import chain, repeat

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lr_callback as lrc
from lr_callback import Factorization, Tuning
from lr_callback.cli import main
from lr_callback.units.latency import Timing, trust

pytestmark = [
    pytest.mark.usefixtures("one_thread", "any_clock"),
    # Lightning calls methods of its parser that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


class Images(LightningModule):
    """Saves its arguments; its step calls the network inside it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Conv2d(4, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 16), nn.Linear(16, 3)]
        self.network = nn.Sequential(*layers)

    def validation_step(self, batch, batch_idx):
        self.network(batch)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 4, 6, 6), batch_size=2)


class Known(Images):
    """Knows an example of its input."""

    def __init__(self, width: int = 8):
        super().__init__(width)
        self.example_input_array = torch.ones(2, 4, 6, 6)

    def forward(self, images):
        return self.network(images)


class Silent(LightningModule):
    """Says nothing of how it is called."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.network = Images(width).network

    def forward(self, images):
        return self.network(images)


class Inside(nn.Sequential):
    """The network alone."""

    def __init__(self):
        super().__init__(*Images().network)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs ``lr-callback tune`` in this process and returns what it printed."""
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        main(["tune", *[str(one) for one in arguments]])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(command, capsys, monkeypatch):
    """Return a function that returns the text with which the command ends before anything is measured."""

    def measured(*_, **__):
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr("lr_callback.tuning.timed_forms.Bench", measured)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def compressed(model):
    choice = Factorization("kernel_in_encoder", 2, 2, 0.0, 0, 1)
    shapes = {"network.0": (8, 4, 3, 3), "network.3": (16, 128)}
    lrc.factorize_(model, lrc.Allocation(dict.fromkeys(shapes, choice), {}, shapes, 0, 1, 0, 1.0))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a compressed module of a class as a Trainer does."""

    def save(kind, name):
        model = compressed(kind())
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(tmp_path / name)
        return model, tmp_path / name

    return save


@pytest.fixture
def timed_as(monkeypatch):
    """Let layers and model have given times: of the forms, and of the whole in the order in which it is timed."""

    def give(forms, *whole):
        structures = {(2, 2): "as built", (1, 4): "one block", None: "dense"}

        def form_time(bench, layer, calls, form):
            return Timing(forms[structures[form and form[1:]]], 0.01)

        monkeypatch.setattr("lr_callback.units.latency.Bench.timing", form_time)
        # At the end it is timed as it is built again, as it was at first.
        given = chain(whole, repeat(whole[0]))
        monkeypatch.setattr("lr_callback.tuning.timed_forms.timed", lambda *_: Timing(next(given), 0.01))

    return give


BLOCK = {"as built": 1000, "one block": 500, "dense": 900}
DENSE = {"as built": 1000, "one block": 980, "dense": 500}
BUILT = {"as built": 1000, "one block": 980, "dense": 1500}
MODEL = ["--model", "my_modules.Known"]


def test_layers_that_take_longer_than_the_whole_model_are_told_of(saved, command, timed_as, monkeypatch):
    _, checkpoint = saved(Known, "last.ckpt")
    monkeypatch.setattr(trust, "EXCESS_SAID", 0.25)
    monkeypatch.setattr(trust, "_CALL", 0)  # the times are of a thousandth of a call's
    timed_as(BUILT, 1_250)
    with pytest.warns(UserWarning, match="the layers take 0.002 ms by themselves, and the whole model 0.00125 ms"):
        command("--checkpoint", checkpoint, *MODEL)


def test_times_that_tell_nothing_write_nothing(saved, command, timed_as, monkeypatch, tmp_path, capsys):
    _, checkpoint = saved(Known, "last.ckpt")
    monkeypatch.setattr(trust, "EXCESS_SAID", 0.25)
    monkeypatch.setattr(trust, "_CALL", 0)  # the times are of a thousandth of a call's
    monkeypatch.setattr(trust, "SPREAD_REFUSED", 2.0)
    timed_as(BUILT, 100)
    with pytest.raises(SystemExit):
        command("--checkpoint", checkpoint, *MODEL, "--output", "tuned.pt")
    assert "too noisy to choose by: the layers take 0.002 ms by themselves" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir() if one.suffix} == {"last.ckpt"}


def test_what_is_faster_than_at_first_only_is_not_called_faster(saved, command, timed_as):
    """At the end the model takes three times as long as it did, built alike."""
    _, checkpoint = saved(Known, "last.ckpt")
    timed_as(BLOCK, 10_000, 8_000, 9_900, 9_900, 30_000)
    shown = " ".join(command("--checkpoint", checkpoint, *MODEL).split())
    assert "2 of 2 factorized layers are faster in another form; the whole model is not clearly faster" in shown


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("kind", [Images, Known])
def test_a_run_is_measured_as_it_is_called(kind, saved, command, tmp_path):
    _, checkpoint = saved(kind, "last.ckpt")
    shown = command("--checkpoint", checkpoint, "--model", f"my_modules.{kind.__name__}", "--json", "times.json")
    tuning = Tuning.from_json(tmp_path / "times.json")
    assert str(tuning) in shown
    assert shown.endswith("times: times.json\n")
    assert list(tuning.layers) == ["network.0", "network.3"]
    assert tuning.inputs == ("2x4x6x6 float32",)
    assert {one.name for one in tmp_path.iterdir()} == {"last.ckpt", "times.json"}


@pytest.mark.parametrize(("times", "form"), [(BLOCK, "one block"), (DENSE, "dense"), (BUILT, "as built")])
@pytest.mark.parametrize("output", ["tuned.ckpt", "tuned.pt", "tuned.safetensors"])
def test_what_is_written_restores_as_any_other(times, form, output, saved, command, timed_as, tmp_path):
    if output.endswith("safetensors"):
        pytest.importorskip("safetensors")
    model, checkpoint = saved(Known, "last.ckpt")
    timed_as(times, 10_000, *([] if form == "as built" else [8_000]), 9_900, 9_900)
    shown = command("--checkpoint", checkpoint, *MODEL, "--output", output)
    how = "as they were built" if form == "as built" else "in the chosen forms"
    assert f"weights {how}: {output}\nread it with: lr_callback.restore_(model, '{output}')" in shown
    fresh = Known().eval()
    lrc.restore_(fresh, tmp_path / output)
    images = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.allclose(fresh(images), model(images), atol=1e-5)
    kinds = {"dense": "Linear"}.get(form, "FactorizedLinear")
    assert type(fresh.network[3]).__name__ == kinds
    if form != "dense":
        assert fresh.network[3].num_slices == (1 if form == "one block" else 2)
    if output == "tuned.ckpt":
        loaded = lrc.load_from_checkpoint(Known, tmp_path / output).eval()
        with torch.no_grad():
            assert torch.equal(loaded(images), fresh(images))
        written = torch.load(tmp_path / output)
        assert written["hyper_parameters"] == {"width": 8}
        assert not {"optimizer_states", "callbacks", "loops", "allocation"} & written.keys()


def test_a_tuned_file_is_tuned_and_exported_again(saved, command, timed_as, tmp_path, capsys):
    _, checkpoint = saved(Known, "last.ckpt")
    timed_as(BLOCK, 10_000, 8_000, 9_000, 9_000)
    command("--checkpoint", checkpoint, *MODEL, "--output", "tuned.ckpt")
    main(["export", "--checkpoint", "tuned.ckpt", *MODEL, "--format", "torch-export"])
    images = torch.ones(5, 4, 6, 6)
    fresh = Known().eval()
    lrc.restore_(fresh, "tuned.ckpt")
    with torch.no_grad():
        assert torch.allclose(torch.export.load("tuned.pt2").module()(images), fresh(images), atol=1e-6)


def test_it_says_plainly_that_nothing_is_faster(saved, command, timed_as):
    _, checkpoint = saved(Known, "last.ckpt")
    timed_as(BUILT, 10_000, 10_000, 10_000)
    shown = " ".join(command("--checkpoint", checkpoint, *MODEL).split())
    assert "No other form of a layer is clearly faster: the layers stay as they were built." in shown
    assert "In channels_last, weights and inputs, the model is not clearly faster." in shown
    assert "as convolutions of one pixel, `pointwise_(model)`, it is not clearly faster." in shown


def test_channels_last_is_told_where_no_file_keeps_it(saved, command, timed_as):
    _, checkpoint = saved(Known, "last.ckpt")
    timed_as(BUILT, 10_000, 7_000, 10_000)
    shown = command("--checkpoint", checkpoint, *MODEL, "--output", "tuned.ckpt")
    assert "In channels_last, weights and inputs, the model is faster." in shown
    assert shown.endswith("after reading it: model.to(memory_format=torch.channels_last)\n")


def test_pointwise_is_told_where_no_file_keeps_it(saved, command, timed_as):
    _, checkpoint = saved(Known, "last.ckpt")
    timed_as(BUILT, 10_000, 10_000, 7_000)
    shown = command("--checkpoint", checkpoint, *MODEL, "--output", "tuned.ckpt")
    assert "`pointwise_(model)`, it is faster." in " ".join(shown.split())
    assert shown.endswith("after reading it: lr_callback.pointwise_(model)\n")


def test_batch_size_and_shape_of_the_input(saved, command, timed_as, tmp_path):
    _, checkpoint = saved(Silent, "last.ckpt")
    shape = ["--model", "my_modules.Silent", "--model.width", 8]
    timed_as(BUILT, 10_000, 10_000, 10_000)
    command("--checkpoint", checkpoint, *shape, "--input_shape", "1,4,6,6", "--batch_size", 7, "--json", "times.json")
    assert Tuning.from_json(tmp_path / "times.json").inputs == ("7x4x6x6 float32",)
    assert json.loads((tmp_path / "times.json").read_text())["device"]["type"] == "cpu"


def test_a_network_inside_is_written_alone(saved, command, timed_as, tmp_path):
    model, checkpoint = saved(Known, "last.ckpt")
    timed_as(DENSE, 10_000, 9_000, 9_000, 9_000)
    inside = ["--model", "my_modules.Inside", "--input_shape", "1,4,6,6"]
    command("--checkpoint", checkpoint, *inside, "--output", "tuned.ckpt")
    assert list(torch.load(tmp_path / "tuned.ckpt")) == list(nn.Sequential(*Images().network).state_dict())
    fresh = Known().eval()
    lrc.restore_(fresh.network, tmp_path / "tuned.ckpt")
    images = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.allclose(fresh(images), model(images), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_refused_with_one_message_before_anything_is_measured(saved, refusal, tmp_path):
    _, checkpoint = saved(Known, "last.ckpt")
    _, silent = saved(Silent, "silent.ckpt")
    dense, pair = Known(), tmp_path / "dense.pt"
    torch.save(dense.state_dict(), pair)
    torch.save(nn.Linear(8, 8).state_dict(), tmp_path / "linear.pt")
    linear = ["--model", "torch.nn.Linear", "--model.in_features", 8, "--model.out_features", 8]
    (tmp_path / "folder").mkdir()
    given = ["--checkpoint", checkpoint, *MODEL]
    for arguments, text in [
        ([], "checkpoint"),
        (["--checkpoint", "none.ckpt"], "none.ckpt: no such file"),
        (["--checkpoint", silent], "--model must name a model, .*silent.ckpt does not say how its model is made"),
        (
            ["--checkpoint", silent, "--model", "my_modules.Silent"],
            "must say what is run and with which input, found no such step, or no data",
        ),
        (["--checkpoint", tmp_path / "linear.pt", *linear], "--input_shape must say what Linear is called with"),
        (["--checkpoint", pair, *MODEL], "--model: must have a factorized layer, found none in Known"),
        ([*given, "--output", "none/tuned.ckpt"], "--output none/tuned.ckpt: its folder must exist, found none"),
        ([*given, "--output", "folder"], "--output must name a file, found the folder folder"),
        ([*given, "--output", checkpoint], "--output must be another file than the checkpoint"),
        (
            [*given, "--output", "tuned.onnx"],
            "--output tuned.onnx: must end in .ckpt or .*, found '.onnx'; name it tuned.ckpt",
        ),
        ([*given, "--json", "none/times.json"], "--json none/times.json: its folder must exist, found none"),
        ([*given, "--json", checkpoint], "--json must be another file than the checkpoint"),
        ([*given, "--output", "tuned.txt"], "--output tuned.txt: must end in .ckpt or "),
        ([*given, "--json", "times.py"], "--json times.py: must end in .json, .*, found '.py'; name it times.json"),
        ([*given, "--batch_size", "many"], "--batch_size must be a whole number, got many"),
        ([*given, "--batch_size", 0], "--batch_size must be at least 1, got 0"),
        ([*given, "--device", "tpu:9"], "--device must be one that is here, as cpu or cuda, got tpu:9: "),
        ([*given, "--device", "meta"], "--device must be one that is here, as cpu or cuda, got meta: "),
        ([*given, "--input_shape", "2,x"], "--input_shape must be whole numbers from 1, .*2,x"),
        ([*given, "--input_shape", "0,7"], "--input_shape must be whole numbers from 1, .*0,7"),
        ([*given, "--input_shape", "-1,7"], "--input_shape: a value must follow, found none; .* as --input_shape=-1"),
        (
            [*given, "--input_shape", "2,7"],
            r"--input_shape: Known must take it, found that inputs of shape \(2, 7\)",
        ),
    ]:
        assert re.search(text, refusal(*arguments)), arguments
    assert {one.name for one in tmp_path.iterdir()} == {"last.ckpt", "silent.ckpt", "dense.pt", "linear.pt", "folder"}


def test_a_folder_that_takes_no_file_is_refused(saved, refusal, monkeypatch):
    _, checkpoint = saved(Known, "last.ckpt")

    def full(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lr_callback.commands.from_checkpoint.TemporaryDirectory", full)
    text = refusal("--checkpoint", checkpoint, *MODEL, "--output", "tuned.ckpt")
    assert "Permission denied" in text


def test_tensors_of_different_numbers_of_rows_have_no_batch_size(saved, refusal, monkeypatch):
    _, checkpoint = saved(Known, "last.ckpt")
    monkeypatch.setattr(Known, "forward", lambda self, images, more: self.network(images))
    made = Known.__init__

    def init(self, width: int = 8):
        made(self, width)
        self.example_input_array = (torch.ones(2, 4, 6, 6), torch.ones(3))

    monkeypatch.setattr(Known, "__init__", init)
    text = refusal("--checkpoint", checkpoint, *MODEL, "--batch_size", 4)
    assert "--batch_size: all tensors of the input must have the same number of rows" in text
    assert "(2, 4, 6, 6), (3,)" in text


def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{word}" in shown for word in ("checkpoint", "output", "json", "batch_size", "device", "model"))
