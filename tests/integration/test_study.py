"""Studies: runs with a real Trainer, what they share, what is repeated, and the command on top of them."""

import csv
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import LightningDataModule, Trainer

import lr_callback as lrc
from lr_callback.cli import main
from lr_callback.commands.study.command import study_command
from lr_callback.commands.study.plan import CONTROL, Plan, Run, Treatment
from lr_callback.commands.study.runs import Laboratory
from lr_callback.decisions.methods import ALDSK, LRank

pytest.importorskip("sklearn")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Calls of names that newer versions of jsonargparse deprecate.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU = {"accelerator": "cpu", "num_sanity_val_steps": 0}


class Digits(LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader(shuffle=True)

    def val_dataloader(self):
        return self.loader()

    def test_dataloader(self):
        return self.loader()


@pytest.fixture
def laboratory(new_module, loader, tmp_path):
    """Return a maker of laboratories for a small network on 256 digits."""

    def make(treatments=None, **plan) -> Laboratory:
        def fresh():
            return new_module(), Digits(loader)

        own = Plan(treatments or {"ALDS": Treatment()}, **{"keep_ratios": [0.5], **plan})
        return Laboratory(fresh, own, {}, CPU, tmp_path)

    return make


def by_hand(laboratory, seed, *callbacks, epochs=1):
    """Train as a person would, with a Trainer alone; return the module and its test."""
    seed_everything(seed, verbose=False)
    module, data = laboratory.make()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**CPU, **silent, enable_model_summary=False, max_epochs=epochs, callbacks=list(callbacks))
    before = trainer.test(module, data, verbose=False)[0]
    seed_everything(seed, verbose=False)
    trainer.fit(module, data)
    return module, before, trainer.test(module, data, verbose=False)[0]


def test_the_control_is_what_a_trainer_without_the_callback_makes(laboratory):
    room = laboratory(epochs=1)
    row = room.run(Run(CONTROL, 1.0, 3))
    _, before, after = by_hand(room, 3)
    assert (row.right_after, row.after) == (before, after)
    assert before != after
    assert (row.kept_parameters, row.kept_multiply_adds, row.reason) == (1.0, 1.0, None)


@pytest.mark.parametrize("treatment", [Treatment(), Treatment(LRank(), recalibrate_batchnorm=True)], ids=str)
def test_a_method_is_what_the_callback_makes_in_that_trainer(laboratory, treatment):
    room = laboratory({"one": treatment}, epochs=1)
    row = room.run(Run("one", 0.5, 3))
    callback = lrc.LowRankCompression(0.5, epochs=0, show_table=False, **treatment.options)
    module, _, after = by_hand(room, 3, callback)
    assert row.after == after
    assert row.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert row.parameters <= 0.5 * row.parameters / row.kept_parameters
    assert row.right_after != row.after
    assert 0 < row.kept_multiply_adds < 1


def test_right_after_the_cut_is_the_same_whether_there_is_training_or_none(laboratory):
    rows = [laboratory(epochs=epochs).run(Run("ALDS", 0.5, 0)) for epochs in (0, 1)]
    assert rows[0].right_after == rows[1].right_after
    assert (rows[0].parameters, rows[0].multiply_adds) == (rows[1].parameters, rows[1].multiply_adds)
    assert rows[0].after == {} and rows[1].after


def test_without_epochs_nothing_is_trained(laboratory, monkeypatch):
    room = laboratory({"ALDS": Treatment(lrc.ALDS())}, epochs=0)
    steps = []
    monkeypatch.setattr(type(room.make()[0]), "training_step", lambda *_: steps.append(1))
    assert room.run(Run("ALDS", 0.5, 0)).reason is None
    assert room.run(Run(CONTROL, 1.0, 0)).after == {}
    assert steps == []


def test_filters_are_pruned_and_trained_on_like_the_rest(laboratory):
    pytest.importorskip("torch_pruning")
    row = laboratory({"filters": Treatment(filter_pruning="l2")}, epochs=1).run(Run("filters", 0.5, 0))
    assert row.reason is None
    assert 0.3 < row.kept_parameters <= 0.5
    assert 0 < row.kept_multiply_adds < 1
    assert row.after["test_loss"] < row.right_after["test_loss"]


@pytest.mark.parametrize(
    ("treatment", "keep_ratio", "reason"),
    [
        (
            Treatment(ALDSK()),
            0.01,
            r"`keep_ratio`=0\.01: the budget must be at least .* Reachable: keep_ratio from 0\.",
        ),
        (Treatment(lrc.ALDS("fisher")), 0.5, "error='fisher' weighs layers by the mean squared gradients"),
    ],
    ids=["budget", "optimizer"],
)
def test_what_cannot_be_done_is_a_row_with_the_reason(laboratory, treatment, keep_ratio, reason):
    row = laboratory({"one": treatment}, epochs=1).run(Run("one", keep_ratio, 0))
    assert re.search(reason, row.reason)
    assert (row.parameters, row.kept_parameters, row.right_after, row.after) == (None, None, {}, {})


def test_what_is_wrong_with_the_control_is_an_error(laboratory, monkeypatch):
    room = laboratory(epochs=1)

    def broken(*_):
        raise ValueError("a broken step")

    monkeypatch.setattr(type(room.make()[0]), "training_step", broken)
    with pytest.raises(ValueError, match="a broken step"):
        room.run(Run(CONTROL, 1.0, 0))


@pytest.mark.filterwarnings("ignore:LowRankCompression. the snapshot .* could not be written")
def test_a_folder_that_takes_no_weights_is_told_of(laboratory, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: nullcontext(str(tmp_path / "file" / "scratch")))
    with pytest.raises(OSError, match=r"right after a cut must be kept .*scratch took no file; make room there"):
        laboratory({"ALDS": Treatment(lrc.ALDS())}, epochs=1).run(Run("ALDS", 0.5, 0))


def test_the_dense_network_is_trained_once_for_each_seed(laboratory, tmp_path):
    room = laboratory(epochs=0, dense_epochs=1, seeds=[0, 1])
    control, cut = room.run(Run(CONTROL, 1.0, 0)), room.run(Run("ALDS", 0.99, 0))
    (file,) = tmp_path.glob("dense-*.pt")
    written = file.stat().st_mtime_ns
    _, _, trained = by_hand(room, 0)
    assert control.right_after == trained
    assert abs(cut.right_after["test_loss"] - trained["test_loss"]) < 0.1
    assert room.run(Run(CONTROL, 1.0, 1)).right_after != trained
    assert file.stat().st_mtime_ns == written
    assert len(list(tmp_path.glob("dense-*.pt"))) == 2
    assert not list(tmp_path.glob("*.part"))


DIGITS = ["--config", str(CONFIGS / "study_digits.yaml"), "--model.init_args.warmup_epochs", "0"]
DIGITS += ["--seeds", "[0]", "--keep_ratios", "[0.4]", "--dense_epochs", "1", "--epochs", "1"]
DIGITS += ["--trainer.limit_train_batches", "3", "--trainer.limit_test_batches", "2"]
PLAIN = {"method": {"class_path": "lr_callback.ALDS"}}
TWO = {"ALDS": PLAIN, "L-Rank": {"method": {"class_path": "lr_callback.LRank"}}}


def command(folder, *more, methods=TWO):
    """Run a tiny study on the digits; return what it wrote, line by line."""
    lines = []
    arguments = [*DIGITS, "--output", str(folder), "--methods", json.dumps(methods), *more]
    study_command(arguments, lines.append)
    return lines


def rows_of(folder):
    with (folder / "study.csv").open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def test_one_command_writes_rows_figure_and_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "study"
    main(["study", *DIGITS, "--output", str(folder), "--methods", json.dumps(TWO)])
    shown = capsys.readouterr().out
    assert [line.partition(":")[0] for line in shown.splitlines()[:3]] == [
        "[1/3] dense, seed 0",
        "[2/3] ALDS, keep 0.4, seed 0",
        "[3/3] L-Rank, keep 0.4, seed 0",
    ]
    assert re.search(
        r"^method +keep +parameters % .* test_accuracy %, right after +after 1 epochs +- dense$", shown, re.M
    )
    assert len(re.findall(r"^(?:dense|ALDS|L-Rank) ", shown, re.M)) == 3
    rows = rows_of(folder)
    assert [one["method"] for one in rows] == ["dense", "ALDS", "L-Rank"]
    assert all(0 < float(one["kept_parameters"]) <= 0.4 for one in rows[1:])
    assert all(float(one["after_test_accuracy"]) > 0 and one["right_after_test_loss"] for one in rows)
    written = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert len(written["rows"]) == 3
    assert written["study"]["model"]["init_args"]["network"]["init_args"]["depth"] == 8
    assert {"torch", "lightning", "processor"} <= set(written["environments"][0])
    assert (folder / "study.png").stat().st_size > 10_000


def test_what_was_run_is_not_repeated_and_a_study_can_grow(tmp_path):
    lines = command(tmp_path, methods={"ALDS": PLAIN})
    assert sum("done before" in line for line in lines) == 0
    before = rows_of(tmp_path)
    lines = command(tmp_path, "--metric", "test_loss", methods={"K": TWO["L-Rank"], "ours": PLAIN})
    assert [line.endswith("(done before)") for line in lines[:3]] == [True, False, True]
    assert lines[2].startswith("[3/3] ours, keep 0.4, seed 0: test_loss ")
    after = rows_of(tmp_path)
    assert {**after[2], "method": "ALDS"} == before[1]
    assert [one["method"] for one in after] == ["dense", "K", "ours"]
    changed = command(tmp_path, "--epochs", "0", methods={"ALDS": PLAIN})
    assert not any("done before" in line for line in changed)
    assert len(json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["rows"]) == 5


def test_interrupted_between_two_runs_it_goes_on_there(tmp_path):
    lines = []

    def write(line):
        lines.append(line)
        if line.startswith("[2/3]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_command([*DIGITS, "--output", str(tmp_path), "--methods", json.dumps(TWO)], write)
    assert len(json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["rows"]) == 2
    again = command(tmp_path)
    assert [line.endswith("(done before)") for line in again[:3]] == [True, True, False]


INTERRUPTED = """
import json, os, signal, sys
from lightning.pytorch import Trainer
from lr_callback.cli import main
from lr_callback.recipes import ImageClassifier

class Interrupting(ImageClassifier):
    def on_train_batch_end(self, *_):
        if any(type(one).__name__ == "LowRankCompression" for one in self.trainer.callbacks):
            os.kill(os.getpid(), signal.SIGINT)

main(["study", *json.loads(sys.argv[1]), "--model.class_path", "__main__.Interrupting"])
"""


def test_ctrl_c_in_the_middle_of_a_run_leaves_whole_files_and_all_runs_before(tmp_path):
    arguments = [*DIGITS, "--output", str(tmp_path / "out"), "--methods", json.dumps(TWO)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, json.dumps(arguments)], env=environment,
                          capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert "[1/3] dense, seed 0" in done.stdout and "[2/3]" not in done.stdout, done.stderr
    names = {file.name.partition("-")[0] for file in (tmp_path / "out").iterdir()}
    assert names == {"study.json", "study.csv", "dense"}
    (row,) = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))["rows"]
    assert row["method"] == "dense" and rows_of(tmp_path / "out")[0]["key"] == row["key"]
    assert not list((tmp_path / "scratch").rglob("*.ckpt*"))


def test_without_matplotlib_the_rows_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"The figure was not drawn: matplotlib must be installed"):
        command(tmp_path, "--epochs", "0", methods={"ALDS": PLAIN})
    assert len(rows_of(tmp_path)) == 2
    assert not (tmp_path / "study.png").exists()


@pytest.mark.parametrize(
    ("more", "methods", "message"),
    [
        ([], {}, "--methods must name at least one method"),
        (["--keep_ratios", "[1.5]"], TWO, r"--keep_ratios must be numbers in \(0, 1\).* got 1\.5"),
        (["--epochs", "-1"], TWO, "--epochs must be at least 0, got -1"),
        (["--output", __file__], TWO, r"--output must be a folder, found the file .*test_study\.py; choose another"),
        (
            ["--output", f"{__file__}/x"],
            TWO,
            r"--output must be a folder that can be made, .*test_study\.py/x cannot \(Not",
        ),
        (
            ["--model.init_args.schedule", "cosine", "--model.init_args.warmup_epochs", "1"],
            TWO,
            r"error: ImageClassifier: the cosine schedule needs .* above warmup_epochs=1, got 1; set it, or .*\n$",
        ),
        (["--metric", "speed"], TWO, r"--metric must be one of \['test_loss', 'test_accuracy'\].* got 'speed'"),
        ([], {"both": {"filter_pruning": "l1", "refit": "cut"}}, "`filter_pruning`='l1' is done without the callback"),
        (
            [],
            {"one": {"method": {"class_path": "torch.nn.ReLU"}}},
            r"--methods\.method must name a Method, found",
        ),
        (["--trainer.max_epochs", "3"], TWO, "max_epochs"),
    ],
    ids=["no method", "ratio", "epochs", "output", "folder", "training", "metric", "both", "no Method", "ours"],
)
def test_bad_input_ends_with_what_to_do(tmp_path, capsys, more, methods, message):
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path / "out", *more, methods=methods)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "study.json").exists()


def networks(**depths):
    """Return networks of some depths, as JSON."""
    return json.dumps(
        {
            name: {
                "class_path": "lr_callback.recipes.ImageClassifier",
                "init_args": {
                    "network": {
                        "class_path": "lr_callback.recipes.CifarResNet",
                        "init_args": {"depth": depth, "in_channels": 1},
                    },
                    "learning_rate": 0.05,
                },
            }
            for name, depth in depths.items()
        }
    )


DATA = ["--data.class_path", "lr_callback.recipes.DigitsData", "--trainer.accelerator", "cpu"]
SHORT = ["--keep_ratios", "[0.4]", "--trainer.limit_train_batches", "3", "--trainer.limit_test_batches", "2"]


def several(folder, *more, methods=TWO):
    lines = []
    study_command([*DATA, *SHORT, "--output", str(folder), "--methods", json.dumps(methods), *more], lines.append)
    return lines


def test_several_networks_are_compared_each_with_its_own_control_table_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    lines = several(tmp_path, "--networks", networks(small=8, deep=14))
    assert [line.partition(": test_accuracy")[0] for line in lines[:6]] == [
        "[1/6] small, dense, seed 0",
        "[2/6] small, ALDS, keep 0.4, seed 0",
        "[3/6] small, L-Rank, keep 0.4, seed 0",
        "[4/6] deep, dense, seed 0",
        "[5/6] deep, ALDS, keep 0.4, seed 0",
        "[6/6] deep, L-Rank, keep 0.4, seed 0",
    ]
    tables = lines[6].strip().split("\n\n")
    assert [table.splitlines()[0] for table in tables] == ["small", "deep"]
    assert all(len(re.findall(r"^(?:dense|ALDS|L-Rank) ", table, re.M)) == 3 for table in tables)
    rows = rows_of(tmp_path)
    assert [one["network"] for one in rows] == ["small"] * 3 + ["deep"] * 3
    assert int(rows[0]["parameters"]) < int(rows[3]["parameters"])
    assert float(rows[4]["kept_parameters"]) == pytest.approx(0.4, abs=0.02)
    assert {file.name for file in tmp_path.glob("*.png")} == {"study-small.png", "study-deep.png"}
    again = several(tmp_path, "--networks", networks(other=8))
    assert all(line.endswith("(done before)") and "other" in line for line in again[:3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "either --model must name a LightningModule, .* or --networks several by names .* found neither"),
        (["--networks", "{}"], "--networks must have names of letters, .* found none"),
        (["--networks", networks(**{"a/b": 8})], "--networks must have names of letters, .* found 'a/b'"),
    ],
)
def test_a_study_of_no_network_or_of_names_that_no_file_can_have_is_refused(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        several(tmp_path / "out", *more)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    with pytest.raises(SystemExit):
        command(tmp_path / "out", "--networks", networks(one=8))
    assert "found both" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
