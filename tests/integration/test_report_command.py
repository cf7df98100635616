"""``lr-callback report``: a page of what the compression of a checkpoint did, with what can be had."""

import html
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.cli import main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning calls methods of its parser that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
MODEL = ("--model", "my_modules.Images")


class Images(LightningModule):
    """A classifier with data of its own, that saves its arguments."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Conv2d(4, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 16), nn.Linear(16, 3)]
            self.network = nn.Sequential(*layers)

    def batches(self):
        images = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    train_dataloader = val_dataloader = batches

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithoutData(Images):
    """The same without a loop that could be run."""

    validation_step = LightningModule.validation_step
    val_dataloader = LightningModule.val_dataloader

    def forward(self, images):
        return self.network(images)


class WithoutLoader(Images):
    """The same, with data that stand beside it."""

    val_dataloader = LightningModule.val_dataloader


class BrokenStep(Images):
    """The same, with a mistake in its step."""

    def validation_step(self, batch, batch_idx):
        raise KeyError("labels")


class BrokenWhenCut(Images):
    """The same, with a step that takes a layer for a dense one."""

    def validation_step(self, batch, batch_idx):
        assert type(self.network[3]) is nn.Linear, "not dense"
        super().validation_step(batch, batch_idx)


class BrokenModel(Images):
    """The same, that cannot be made."""

    def __init__(self, width: int = 16):
        super().__init__(width)
        self.names = {}["names"]


class BrokenForward(WithoutData):
    """The same, with a mistake where it is called."""

    example_input_array = torch.zeros(2, 4, 6, 6)

    def forward(self, images):
        return self.netwrok(images)


class BrokenSetup(LightningDataModule):
    """Data that are not there."""

    def setup(self, stage):
        raise RuntimeError("no data in /data")

    def val_dataloader(self):
        return Images().batches()


class BrokenLoader(LightningDataModule):
    """Data that are not there, either."""

    def val_dataloader(self):
        return open("/gone/labels.csv")


class BrokenData(LightningDataModule):
    """Data that cannot be made."""

    def __init__(self):
        raise ValueError("which data?")


class EmptyData(LightningDataModule):
    """Data that are none."""

    def val_dataloader(self):
        return None


class Data(LightningDataModule):
    """These data; notes how many were asked for."""

    made: ClassVar[list[int]] = []

    def __init__(self, samples: int = 8):
        super().__init__()
        self.made.append(samples)

    def val_dataloader(self):
        return Images().batches()


def trained(folder, snapshots=True, **options):
    """Train and compress; return the checkpoint of the last epoch, and what became of the run."""
    compression = lrc.LowRankCompression(0.5, epochs=1, snapshots=snapshots, show_table=False, **options)
    saving = ModelCheckpoint(folder / "checkpoints", monitor="val_acc", mode="max", save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[compression, saving], log_every_n_steps=1,
    )  # fmt: skip
    module = Images()
    trainer.fit(module)
    files = sorted((folder / "checkpoints").iterdir())
    return SimpleNamespace(before=files[0], last=files[1], module=module, compression=compression, folder=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a short run with snapshots."""
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs ``lr-callback report`` in this process, and returns what it printed and the page."""
    monkeypatch.setitem(sys.modules, "my_modules", sys.modules[__name__])

    def report(checkpoint, *arguments):
        output = tmp_path / "page.html"
        output.unlink(missing_ok=True)
        capsys.readouterr()
        main(["report", "--checkpoint", str(checkpoint), "--output", str(output), *map(str, arguments)])
        return SimpleNamespace(out=capsys.readouterr().out, page=output.read_text(encoding="utf-8"), path=output)

    return report


@pytest.fixture
def refusal(command, capsys):
    """Return a function that returns the text with which the command ends."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return refused


def rows_of(page):
    """Return the cells of the table of stages: row -> values."""
    table = page[page.index("<h2>Before and after") : page.index("<h2>Layers")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return {row[0]: row[1:] for row in rows}


def lacking(out):
    return re.findall(r"^without (.*?):", out, re.MULTILINE)


def accuracy(file):
    module = Images()
    lrc.restore_(module, file)
    with torch.no_grad():
        found = [(module.network(images).argmax(1) == labels).float().mean() for images, labels in module.batches()]
    return f"{float(torch.stack(found).mean()):.2%}"


def test_with_its_model_a_checkpoint_is_measured_beside_its_snapshots(run, command):
    done = command(run.last, *MODEL)
    assert done.out.splitlines()[0] == f"report: {done.path}"
    assert lacking(done.out) in ([], ["figures"])
    rows, files = rows_of(done.page), run.compression.snapshot_files
    assert rows[""] == ["dense, before", "right after", "this checkpoint"]
    assert rows["val_acc"] == [accuracy(files["dense"]), accuracy(files["cut"]), accuracy(run.last)]
    counts = [sum(one.numel() for one in module.parameters()) for module in (Images(), run.module)]
    assert rows["parameters"][0] == f"{counts[0]:,}"
    assert rows["parameters"][2] == f"{counts[1]:,} ({counts[1] / counts[0]:.1%})"
    assert rows["multiply-adds of a batch"][0] == f"{8 * (16 * 16 * 36 + 256 * 16 + 16 * 3):,}"
    sizes = [Path(files[name]).stat().st_size for name in ("dense", "cut")]
    assert [int(cell.split(" ")[0].replace(",", "")) for cell in rows["bytes of a file of the weights"][:2]] == sizes
    assert all(float(cell.split(" ")[0]) > 0 for cell in rows["milliseconds of a batch"])
    told = "ultiply-adds and milliseconds are of a batch of 8x4x6x6 float32."
    assert told not in done.out and told in done.page


def test_the_page_has_the_figures_of_the_run(run, command):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert re.findall(r"<figure><h3>(.*?)</h3>", command(run.last).page) == [
        "What each layer kept", "Error against size", "Spectra",
    ]  # fmt: skip


def test_without_matplotlib_the_page_has_no_figures_and_says_so(run, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = command(run.last, *MODEL)
    assert lacking(done.out) == ["figures"] and done.out.count("pip install 'lr_callback[figures]'") == 1
    assert "<figure" not in done.page and "<strong>No figures: </strong>" in done.page
    assert "val_acc" in rows_of(done.page)
    assert lacking(command(run.last).out) == ["figures", "times, multiply-adds and metrics"]


def test_a_file_of_the_weights_is_as_large_as_the_last_snapshot(run, command):
    size = int(rows_of(command(run.last).page)["bytes of a file of the weights"][-1].split(" ")[0].replace(",", ""))
    assert size == pytest.approx(Path(run.compression.snapshot_files["final"]).stat().st_size, rel=0.1)
    assert size < run.last.stat().st_size


def test_without_its_model_the_page_says_what_the_file_does_and_how_to_have_more(run, command):
    done = command(run.last)
    assert lacking(done.out)[0] == "times, multiply-adds and metrics"
    assert "--model my_module.MyModule" in done.out and "<h2>What this page lacks" in done.page
    rows, allocation = rows_of(done.page), run.compression.allocation
    assert rows["parameters"][0] == f"{allocation.dense_cost:,}"
    assert rows["parameters"][2].startswith(f"{allocation.cost:,} ")
    assert not {"val_acc", "milliseconds of a batch"} & rows.keys()
    assert "val_acc, at this checkpoint" in done.page  # of ModelCheckpoint
    for name in allocation.layers:
        assert f">{name}<" in done.page


def test_the_run_may_have_been_moved(run, command, tmp_path):
    shutil.copytree(run.folder, tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints" / run.last.name
    (tmp_path / "moved" / "compression" / "dense.ckpt").write_bytes(b"0" * 12345)
    assert rows_of(command(moved).page)["bytes of a file of the weights"][0] == "12,345"


def test_without_snapshots_there_are_sizes_and_times_and_the_accuracy_now(tmp_path, command):
    run = trained(tmp_path, snapshots=False)
    done = command(run.last, *MODEL)
    assert "metrics of the network before" in lacking(done.out)
    rows = rows_of(done.page)
    assert rows[""] == ["dense, before", "this checkpoint"]
    assert rows["val_acc"] == ["\N{EN DASH}", accuracy(run.last)]
    assert float(rows["milliseconds of a batch"][0]) > 0
    assert "that of the dense network is not known" in done.page


def test_a_model_without_data_needs_the_shape_of_its_input(run, command):
    done = command(run.last, "--model", "my_modules.WithoutData", "--input_shape", "2,4,6,6")
    assert "metrics" in lacking(done.out)
    rows = rows_of(done.page)
    assert rows["multiply-adds of a batch"][0] == f"{2 * (16 * 16 * 36 + 256 * 16 + 16 * 3):,}"


def test_an_input_that_the_model_does_not_take_is_refused(run, refusal):
    text = refusal(run.last, "--model", "my_modules.WithoutData", "--input_shape", "2,5,6,6")
    assert "the model must take a batch of 2x5x6x6 float32, found that it makes a RuntimeError: " in text


def line_of(function, words):
    """Return the number of the first line of a function that has some words in it."""
    lines, first = inspect.getsourcelines(function)
    return next(number for number, line in enumerate(lines, first) if words in line)


@pytest.mark.parametrize(
    ("arguments", "lacks", "why", "function", "words"),
    [
        ("BrokenStep", "metrics, times and multiply-adds", "KeyError: 'labels'", BrokenStep.validation_step, "raise"),
        ("BrokenModel", "times, multiply-adds and metrics", "KeyError: 'names'", BrokenModel.__init__, '["names"]'),
        ("WithoutLoader BrokenSetup", "metrics, times and multiply-adds", "RuntimeError: no data in /data",
         BrokenSetup.setup, "raise"),
        ("WithoutLoader BrokenLoader", "metrics, times and multiply-adds", "FileNotFoundError: [Errno 2] No such file",
         BrokenLoader.val_dataloader, "open"),
        ("WithoutLoader BrokenData", "metrics", "ValueError: which data?", BrokenData.__init__, "raise"),
        ("BrokenForward", "times and multiply-adds", "a batch of 2x4x6x6 float32, found that it makes a AttributeError",
         BrokenForward.forward, "netwrok"),
        ("BrokenWhenCut", "metrics of the stage 'right after', metrics of the stage 'this checkpoint'",
         "AssertionError: not dense", BrokenWhenCut.validation_step, "assert"),
    ],
)  # fmt: skip
def test_a_mistake_in_own_code_costs_what_that_was_run_for_and_its_place_is_told(
    run, command, arguments, lacks, why, function, words
):
    model, *data = [f"my_modules.{name}" for name in arguments.split(" ")]
    done = command(run.last, "--model", model, *(["--data", *data] if data else []))
    [line] = [line for line in done.out.splitlines() if line.startswith(f"without {lacks}: ")]
    place = f"{Path(__file__).name}, line {line_of(function, words)}, in {function.__name__}). To have them: "
    assert why in line and place in line
    assert len([one for one in done.out.splitlines() if place in one]) == 1 == done.page.count(place)
    assert f"<strong>No {html.escape(lacks)}: </strong>" in done.page
    assert ("--input_shape" if function is BrokenForward.forward else "mend that, and make the page again") in line
    assert "<h2>Layers" in done.page and rows_of(done.page)["parameters"]


def test_what_stands_before_the_mistake_and_beside_it_is_in_the_page(run, command):
    rows = rows_of(command(run.last, "--model", "my_modules.BrokenWhenCut").page)
    assert rows["val_acc"] == [accuracy(run.compression.snapshot_files["dense"]), *["\N{EN DASH}"] * 2]
    assert float(rows["milliseconds of a batch"][0]) > 0  # of the dense network's step
    done = command(run.last, "--model", "my_modules.Images", "--data", "my_modules.BrokenData")
    assert "val_acc" not in rows_of(done.page)  # the model's own data are not those that were asked for
    assert float(rows_of(done.page)["milliseconds of a batch"][0]) > 0


def test_what_lightning_says_of_own_data_leaves_a_page_too(run, command):
    done = command(run.last, "--model", "my_modules.WithoutLoader", "--data", "my_modules.EmptyData")
    assert lacking(done.out)[-1] == "metrics, times and multiply-adds"
    assert done.out.count("TypeError: An invalid dataloader was returned from `EmptyData.val_dataloader()`") == 1


def test_a_module_with_a_mistake_is_told_with_its_line(run, command, tmp_path, monkeypatch):
    (tmp_path / "mistaken.py").write_text("from my_modules import Images\n\nImagse\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = command(run.last, "--model", "mistaken.Images")
    assert "NameError: name 'Imagse' is not defined (mistaken.py, line 3, in <module>)" in done.out
    assert "from mistaken import Images" in done.page


SCRIPT = """
import argparse
from my_modules import Images

parser = argparse.ArgumentParser()
parser.add_argument("--rate", required=True)
rate = parser.parse_args().rate
"""


def test_a_script_that_ends_the_process_where_its_class_is_imported_leaves_a_page(run, command, tmp_path, monkeypatch):
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lr-callback", "report"])
    done = command(run.last, "--model", "my_script.Images")
    assert "without times, multiply-adds and metrics: SystemExit: 2 (my_script.py, line 7, in <module>)" in done.out


OWN = """
from torch import nn
from torch.utils.data import DataLoader
from lightning.pytorch import LightningDataModule, LightningModule


class Net(LightningModule):
    def __init__(self, width=16):
        super().__init__()
        layers = [nn.Conv2d(4, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 16), nn.Linear(16, 3)]
        self.network = nn.Sequential(*layers)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.network(batch).mean())


class Items(list):
    def __getitem__(self, index):
        return {}["labels"]


class Data(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(Items([1, 2]), num_workers=1)
"""


def test_in_processes_of_its_own_a_mistake_ends_with_a_page_and_no_traceback(run, tmp_path):
    """Of a user's files beside the place where the command is run, in a process that a DataLoader starts."""
    (tmp_path / "own_files.py").write_text(OWN, encoding="utf-8")
    named = ["--checkpoint", run.last, "--output", "page.html", "--model", "own_files.Net", "--data", "own_files.Data"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "lr_callback", "report", *map(str, named)], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    line = OWN.splitlines().index('        return {}["labels"]') + 1
    why = f"KeyError: 'labels' (own_files.py, line {line}, in __getitem__)"
    told = [one for one in done.stdout.splitlines() if not one.startswith("without figures")]
    lacks = "without metrics, times and multiply-adds"
    assert told == ["report: page.html", f"{lacks}: {why}. To have them: mend that, and make the page again"]
    assert html.escape(why) in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_wrong_name_is_a_wrong_command_line(run, refusal):
    assert "; did you mean Images?" in refusal(run.last, "--model", "my_modules.Imagse")
    for shape in ("1,x", "0,4,6,6"):
        assert "--input_shape must be whole numbers from 1" in refusal(run.last, *MODEL, "--input_shape", shape)


def test_the_checkpoint_is_read_once(run, command, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, *more, **named: read.append(path) or load(path, *more, **named))
    command(run.last, *MODEL)
    assert [path for path in read if path == run.last] == [run.last]


def test_code_in_the_page_gives_the_network(run, command):
    [code] = re.findall(
        r"<h2>How to use it</h2><pre[^>]*><code>(.*?)</code>", command(run.last, *MODEL).page, re.DOTALL
    )
    assert "lrc.restore_(model, &#x27;" in code and code.endswith("model.eval()")
    assert "from my_modules import Images" in code and "model = Images(\n    width=16,\n)" in code


def test_commands_in_the_page_name_the_model_as_this_one_did(run, command):
    named = "--model my_modules.WithoutData --input_shape=2,4,6,6"
    assert f"lr-callback tune --checkpoint {run.last} {named}<" in command(run.last, *named.split(" ")).page
    assert f"lr-callback tune --checkpoint {run.last}<" in command(run.last).page


def test_a_configuration_without_classes_is_used_by_those_that_are_named(run, command, tmp_path):
    """As LightningCLI writes it where the program, and not its user, chose the classes."""
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("model: {width: 16}\ndata: {samples: 24}\n")
    file = tmp_path / "run" / "checkpoints" / run.last.name
    assert "the configuration of the run has the arguments of its model, and not the class" in command(file).out
    Data.made.clear()
    done = command(file, "--model", "my_modules.WithoutLoader", "--data", "my_modules.Data")
    assert Data.made == [24] and "metrics" not in lacking(done.out)


def test_a_moment_before_the_compression_is_refused(run, refusal):
    assert "must be of a moment after a compression, found that none had been made yet" in refusal(run.before)


def test_a_file_of_weights_alone_is_refused_and_the_checkpoints_are_named(run, refusal):
    text = refusal(run.compression.snapshot_files["final"])
    assert "must be written by a Trainer with LowRankCompression" in text
    assert f"Beside it are {run.before}, {run.last}." in text


def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path, refusal):
    torch.save({"state_dict": Images().state_dict(), "callbacks": {"EarlyStopping": {"wait": 1}}}, tmp_path / "a.ckpt")
    text = refusal(tmp_path / "a.ckpt")
    assert "found nothing in it that says what became of the layers" in text and "Beside it" not in text


@pytest.mark.parametrize("damage", ["cut off", "record", "weights"])
def test_a_damaged_checkpoint_is_refused(run, refusal, tmp_path, damage):
    path = tmp_path / "damaged.ckpt"
    if damage == "cut off":
        path.write_bytes(run.last.read_bytes()[:5000])
        expected = "must be a checkpoint that torch.load(weights_only=True) reads"
    else:
        loaded = torch.load(run.last, weights_only=True)
        loaded["state_dict"] = {} if damage == "weights" else loaded["state_dict"]
        if damage == "record":
            loaded["callbacks"]["LowRankCompression"]["applied"] = "yes"
        torch.save(loaded, path)
        expected = {"record": "is not a record of a run", "weights": "must be an allocation, a Lightning checkpoint"}[
            damage
        ]
    assert expected in refusal(path)


def test_a_file_of_another_model_is_refused_where_the_model_was_named(run, refusal):
    assert "its weights must be of this model" in refusal(run.last, "--model", "torch.nn.Flatten")


@pytest.mark.parametrize("output", ["/proc/report.html", "/nowhere/report.html", "/tmp"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(run, capsys, output):
    with pytest.raises(SystemExit):
        main(["report", "--checkpoint", str(run.last), "--output", output])
    text = " ".join(capsys.readouterr().err.split())
    assert re.search("its folder must (exist|take a file), found|must name a file, found the folder", text)


def test_only_a_page_is_written_over(run, capsys, tmp_path):
    (tmp_path / "train.py").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--checkpoint", str(run.last), "--output", str(tmp_path / "train.py")])
    assert stopped.value.code == 2 and (tmp_path / "train.py").read_text() == "precious"
    assert "train.py: must end in .html, so that no file of another kind is written over" in capsys.readouterr().err


def test_the_checkpoint_is_not_written_over(run, refusal, capsys):
    before = run.last.read_bytes()
    with pytest.raises(SystemExit):
        main(["report", "--checkpoint", str(run.last), "--output", str(run.last)])
    assert "must be another file than the checkpoint" in capsys.readouterr().err
    assert run.last.read_bytes() == before


def test_a_wrong_command_line_is_refused(run, refusal):
    assert "--outptu" in refusal(run.last, "--outptu", "a.html")
    named = r"name one that ModelCheckpoint wrote\."
    assert re.search(rf"--checkpoint nowhere\.ckpt: no such file; {named}", refusal("nowhere.ckpt"))
    found = refusal(run.last.parent)
    assert re.search(rf"--checkpoint {run.last.parent}: must be a file, found a folder; {named} There are ", found)
    assert str(run.last) in found
    assert "--input_shape must be whole numbers from 1, for example 1,3,32,32, got abc" in refusal(
        run.last, "--input_shape=abc"
    )
    told = refusal(run.last, "--model", "gone.Model")
    assert "--model gone.Model: no module 'gone' is found from here; name the class by the path" in told


def test_what_the_command_line_says_is_named_as_it_is_there(run, refusal, tmp_path):
    told = refusal(run.last, "--model", "lr_callback.recipes.CifarResNet", "--model.depth=8")
    assert "--checkpoint: its weights must be of this model," in told and "source" not in told
    assert "Give the model that the file is of, made with the same arguments." in told
    cut_off = tmp_path / "last.ckpt"
    cut_off.write_bytes(run.last.read_bytes()[:1000])
    told = refusal(cut_off)
    assert "it may be cut off" in told and "Name another checkpoint of the run." in told and "restore_" not in told
    assert "--checkpoint: a value must follow, found none" in refusal("--device=cpu")


def test_a_configuration_that_cannot_be_used_leaves_a_page_without_measurements(run, command, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {class_path: gone.Model}\ncompress: {keep_ratio: 0.4, epochs: 3}\n"
    )
    done = command(tmp_path / "run" / "checkpoints" / run.last.name)
    assert lacking(done.out)[0] == "times, multiply-adds and metrics" and "gone" in done.out
    assert "keep_ratio: 0.4" in done.page and "from gone import Model" in done.page


def test_a_configuration_that_is_no_yaml_is_refused(run, refusal, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("model: {class_path: my_modules.Images\n data: [\n")
    file = tmp_path / "run" / "checkpoints" / run.last.name
    for arguments in ((), MODEL, ("--config", config)):
        assert f"{config}: must be YAML, plain text in UTF-8, found " in refusal(file, *arguments)


def test_a_device_asks_for_no_model_and_no_data(run, command, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("model: {class_path: gone.Model}\ntrainer: 7\n")
    done = command(tmp_path / "run" / "checkpoints" / run.last.name, "--device", "cpu")
    assert lacking(done.out)[-1] == "times, multiply-adds and metrics" and "No module named 'gone'" in done.out


def test_by_default_the_page_stands_beside_the_checkpoint(run, capsys, monkeypatch):
    main(["report", "--checkpoint", str(run.last)])
    page = run.last.with_suffix(".html")
    assert capsys.readouterr().out.splitlines()[0] == f"report: {page}"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    page.unlink()


def test_a_device_that_is_not_here_is_refused_and_a_precision_that_is_not_leaves_a_page(
    run, command, refusal, tmp_path
):
    assert "--device must be one that is here" in refusal(run.last, "--device", "cuda:9")
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {class_path: my_modules.Images}\ntrainer: {precision: 3-bit}\n"
    )
    done = command(tmp_path / "run" / "checkpoints" / run.last.name)
    assert lacking(done.out)[0] == "times, multiply-adds and metrics" and "3-bit" in done.out
    assert len(rows_of(done.page)["parameters"]) == 3
