"""``lr-callback export``: a run's checkpoint becomes a file in one command."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lr_callback as lrc
from lr_callback.cli import main
from lr_callback.common.example import Example, largest_difference
from lr_callback.files.formats import FORMATS
from lr_callback.files.safetensors_file import read_with_notes
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier

pytest.importorskip("sklearn")
for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning calls methods of its parser that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command line in this process and returns what it printed."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        main([str(one) for one in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(command, capsys):
    """Return a function that returns the text with which ``lr-callback export`` ends."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command("export", *arguments)
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return the checkpoint of a short run of configs/digits.yaml, in the folder that its loggers make."""
    folder = tmp_path_factory.mktemp("digits")
    config = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
    flat = ["--trainer.max_epochs=2", "--compress.epochs=1", "--model.init_args.schedule=constant"]
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lr-callback", "fit", "--config", str(config), *flat, *few, *quiet])
        main()
    [checkpoint] = (folder / "lightning_logs" / "version_0" / "checkpoints").iterdir()
    return checkpoint


def restored(checkpoint):
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1)).eval()
    lrc.restore_(model, checkpoint)
    return model


def outputs(file, images):
    [name] = [name for name, row in FORMATS.items() if row.suffix == file.suffix]
    return FORMATS[name].open(file)(Example.of(images))


def images(rows):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.situation("Out of the door", "configs/digits.yaml: fit, then export in one command", "works")
def test_one_command_after_fit(digits, command, format):
    shown = command("export", "--checkpoint", digits, "--format", format)
    file, model = digits.with_suffix(FORMATS[format].suffix), restored(digits)
    networks = ImageClassifier(CifarResNet(depth=8, in_channels=1)), model
    weights = [sum(one.nbytes for one in each.state_dict().values()) for each in networks]
    row = re.split(r" {2,}", shown.splitlines()[1])
    assert row[:-1] == [format, *(f"{size:,}" for size in (*weights, file.stat().st_size))]
    assert float(row[-1]) < 1e-4
    assert shown.splitlines()[2] == str(file)
    if format != "safetensors":
        with torch.no_grad():
            assert largest_difference(model(images(3)), outputs(file, images(3))) < 1e-4
    file.unlink()


def test_safetensors_hold_the_allocation_of_the_run(digits, command, tmp_path):
    from safetensors import safe_open

    command("export", "--checkpoint", digits, "--output", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        allocation = lrc.Allocation.from_json(opened.metadata()["allocation"])
    [written] = [one["allocation"] for one in torch.load(digits)["callbacks"].values() if one.get("allocation")]
    assert allocation == lrc.Allocation.from_dict(written)
    network = CifarResNet(depth=8, in_channels=1).eval()
    lrc.restore_(network, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(network(images(2)), restored(digits)(images(2)))


def test_network_inside_by_its_class_and_the_shape_of_its_input(digits, command, tmp_path):
    from safetensors import safe_open

    network = ["--model", "lr_callback.recipes.CifarResNet", "--model.depth", 8, "--model.in_channels", 1]
    alone = shutil.copy(digits, tmp_path / "alone.ckpt")
    command("export", "--checkpoint", alone, *network, "--input_shape", "1,1,8,8", "--format", "torch-export")
    with torch.no_grad():
        assert torch.equal(outputs(tmp_path / "alone.pt2", images(3)), restored(digits)(images(3)))
    command("export", "--checkpoint", alone, *network, "--format", "safetensors")
    with safe_open(tmp_path / "alone.safetensors", "pt") as opened:
        allocation = lrc.Allocation.from_json(opened.metadata()["allocation"])
    assert all(name.startswith(("conv1", "layer", "linear")) for name in allocation.layers)


def test_configuration_that_stands_elsewhere(digits, command, tmp_path):
    alone = shutil.copy(digits, tmp_path / "alone.ckpt")
    config = digits.parents[1] / "config.yaml"
    done = ["--config", config, "--format", "torch-export", "--dynamic_batch", "false"]
    command("export", "--checkpoint", alone, *done)
    rows = DigitsData().batch_size
    outputs(tmp_path / "alone.pt2", images(rows))
    with pytest.raises(Exception, match="shape"):
        outputs(tmp_path / "alone.pt2", images(3))


def allocation_in(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return lrc.Allocation.from_json(opened.metadata()["allocation"])


def test_allocation_in_a_header_is_carried_over(digits, command, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    command("export", "--checkpoint", digits, "--output", first)
    config = ["--config", digits.parents[1] / "config.yaml"]
    command("export", "--checkpoint", first, *config, "--output", second)
    assert allocation_in(second) == allocation_in(first)
    network = ["--model", "lr_callback.recipes.CifarResNet", "--model.depth", 8, "--model.in_channels", 1]
    command("export", "--checkpoint", first, *network, "--output", second)
    assert all(name.startswith(("conv1", "layer", "linear")) for name in allocation_in(second).layers)


def test_an_allocation_that_is_not_that_of_the_weights_is_left_out_and_told(digits, command, tmp_path):
    loaded = torch.load(digits, weights_only=True)
    [noted] = [one["allocation"] for one in loaded["callbacks"].values() if one.get("allocation")]
    next(layer for layer in noted["layers"].values() if layer)["rank"] += 1
    torch.save(loaded, tmp_path / "went-on.ckpt")
    arguments = ["--config", digits.parents[1] / "config.yaml", "--output", tmp_path / "x.safetensors"]
    with pytest.warns(UserWarning, match=r"went-on\.ckpt: its allocation should be .*the file is written without it"):
        command("export", "--checkpoint", tmp_path / "went-on.ckpt", *arguments)
    assert "allocation" not in read_with_notes(tmp_path / "x.safetensors")[1]


@pytest.mark.situation("Out of the door", "an export over its own checkpoint", "refused")
def test_the_checkpoint_itself_is_not_written_over(digits, command, refusal, tmp_path):
    run, weights, link = tmp_path / "run.ckpt", tmp_path / "weights.safetensors", tmp_path / "link.ckpt"
    shutil.copy(digits, run)
    config = ["--config", digits.parents[1] / "config.yaml"]
    command("export", "--checkpoint", run, *config, "--output", weights)
    link.symlink_to(run)
    before = {file: file.read_bytes() for file in (run, weights)}
    for options in (
        ["--checkpoint", weights, "--format", "safetensors"],
        ["--checkpoint", run, "--format", "onnx", "--output", "run.ckpt"],
        ["--checkpoint", link, "--format", "onnx", "--output", run],
        ["--checkpoint", run, "--format", "onnx", "--output", link],
    ):
        assert "--output must be another file than the checkpoint" in refusal(*options, *config)
    assert before == {file: file.read_bytes() for file in before}
    assert link.is_symlink()


class Saving(LightningModule):
    """Saves its arguments, and knows an example of its input."""

    def __init__(self, width: int, bias: bool = True):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, width)
        self.first, self.second = nn.Linear(width, width, bias=bias), nn.Linear(width, 3)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())


@pytest.fixture
def saved(tmp_path):
    model = Saving(width=32, bias=False)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "saving.ckpt", weights_only=True)
    return model.eval(), tmp_path / "saving.ckpt"


def test_arguments_that_the_module_has_saved(saved, command, monkeypatch):
    model, checkpoint = saved
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])
    command("export", "--checkpoint", checkpoint, "--model", "my_modules.Saving", "--format", "torch-export")
    inputs = torch.randn(5, 32)
    assert torch.equal(outputs(checkpoint.with_suffix(".pt2"), inputs), model(inputs))


def test_class_and_arguments_that_lightning_cli_has_saved(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])
    monkeypatch.setattr(Saving, "__module__", "my_modules")
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["any"])
    options = {"run": False, "subclass_mode_model": True, "save_config_callback": None, "trainer_defaults": quiet}
    cli = LightningCLI(Saving, args=["--model", "my_modules.Saving", "--model.width", "32"], **options)
    cli.trainer.strategy.connect(cli.model)
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    command("export", "--checkpoint", tmp_path / "cli.ckpt", "--format", "torch-export")
    with torch.no_grad():
        assert torch.equal(outputs(tmp_path / "cli.pt2", torch.ones(3, 32)), cli.model.eval()(torch.ones(3, 32)))


def test_arguments_from_the_configuration_of_a_command_line_for_one_class(saved, command, monkeypatch, tmp_path):
    model, checkpoint = saved
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"width": 32, "bias": False}}))
    options = ["--config", tmp_path / "run.yaml", "--model", "my_modules.Saving", "--output", tmp_path / "a.pt2"]
    command("export", "--checkpoint", checkpoint, *options)
    assert torch.equal(outputs(tmp_path / "a.pt2", torch.ones(5, 32)), model(torch.ones(5, 32)))


class Parts(LightningModule):
    """Its step calls two modules one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def validation_step(self, batch, batch_idx):
        self.second(self.first(batch))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4, 8), batch_size=2)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_refused_with_one_message(saved, refusal, monkeypatch, tmp_path):
    _, checkpoint = saved
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])
    torch.save({"state_dict": Parts().state_dict()}, tmp_path / "parts.ckpt")
    (tmp_path / "plan.json").write_text(lrc.allocate(nn.Sequential(nn.Linear(64, 64)), 0.5).to_json())
    given, parts = ["--checkpoint", checkpoint], ["--checkpoint", tmp_path / "parts.ckpt", "--format", "onnx"]
    model = ["--model", "my_modules.Saving"]
    for arguments, text in [
        ([], "checkpoint"),
        (["--checkpoint", "none.ckpt", "--format", "onnx"], "none.ckpt: no such file"),
        (["--checkpoint", tmp_path / "plan.json", "--format", "onnx"], "must be a file with weights, found an alloc"),
        ([*given, *model], "--format must be one of torch-export, onnx, torchscript, safetensors, got none"),
        ([*given, *model, "--format", "tflite"], "--format must be one of torch-export, onnx, .*got tflite"),
        ([*given, *model, "--output", tmp_path / "a.bin"], r"--format must be one of .*the suffix '.bin'"),
        (
            [*given, *model, "--output", "none/a.onnx"],
            "--output none/a.onnx: its folder must exist",
        ),
        ([*given, *model, "--output", tmp_path], "--output must name a file, found the folder"),
        ([*given, *model, "--format", "onnx", "--output", "a.py"], "--output a.py: must end in .onnx, .*found '.py'"),
        ([*given, *model, "--format", "onnx", "--config", "none.yaml"], "--config none.yaml: no such file"),
        ([*given, "--format", "onnx"], "--model must name a model, .*saving.ckpt does not say how its model is made"),
        ([*parts, "--model", "my_modules.Parts"], "must call one module, .*found 2; .*--input_shape"),
        ([*parts, "--model", "torch.nn.Identity"], "names or shapes differ"),
        ([*given, *model, "--model.width", 16, "--format", "onnx"], r"first: the factors .*Nothing was changed"),
        ([*given, *model, "--input_shape", "2,x", "--format", "onnx"], "--input_shape must be whole .* from 1, .*2,x"),
        (
            [*given, *model, "--input_shape", "2,7", "--format", "onnx"],
            r"--input_shape: Saving must take it, .*\(2, 7\) make a R",
        ),
    ]:
        assert re.search(text, refusal(*arguments)), arguments


def test_plain_network_needs_the_shape_of_its_input(refusal, tmp_path):
    torch.save(nn.Linear(8, 8).state_dict(), tmp_path / "weights.pt")
    network = ["--model", "torch.nn.Linear", "--model.in_features", 8, "--model.out_features", 8]
    text = refusal("--checkpoint", tmp_path / "weights.pt", *network, "--format", "onnx")
    assert "--input_shape must say what Linear is called with" in text


def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("export", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--checkpoint", "--format", "--output", "--input_shape", "--model", *FORMATS))
