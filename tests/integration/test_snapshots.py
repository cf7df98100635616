"""Snapshots: where they are written, and where nothing is."""

import gc
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lr_callback import LowRankCompression, restore_

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.situation("Checkpoints", "snapshots under fast_dev_run: nothing is left on the disk", "works")
def test_smoke_test_leaves_nothing_on_the_disk(fit, new_module, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for root in (None, tmp_path / "root"):
        compression = LowRankCompression(0.4, 5, snapshots=True, show_table=False)
        trainer = fit(new_module(), compression, fast_dev_run=True, default_root_dir=root)
        restored = new_module()
        restore_(restored, compression.snapshot_files["cut"])  # it can be looked at as long as the Trainer is there
        assert restored.state_dict().keys() == trainer.lightning_module.state_dict().keys()
        del trainer, compression  # Lightning gives a callback the means to log, and with that the Trainer
        gc.collect()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_a_logger_they_stand_where_lightning_keeps_its_files(fit, new_module, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compression = LowRankCompression([0.6, 0.4], [1, 2], snapshots=True, show_table=False)
    fit(new_module(), compression, default_root_dir=None)
    assert sorted(compression.snapshot_files) == ["cut", "dense", "final"]
    written = {path for path in Path.cwd().rglob("*") if path.is_file()}
    assert written == {Path(path).absolute() for path in compression.snapshot_files.values()}
    assert {path.parent for path in written} == {Path.cwd() / "compression"}


def fit_with_warnings(fit, module, *callbacks, **settings):
    """Return the Trainer, and what was said of snapshots."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, *callbacks, **settings)
    return trainer, [str(one.message) for one in caught if "could not be written" in str(one.message)]


def test_folder_that_takes_no_files_is_said_once_and_the_training_goes_on(fit, new_module, new_watch, tmp_path, same):
    (tmp_path / "file").touch()
    root, ends = tmp_path / "file" / "logs", []
    for snapshots in (True, False):
        compression = LowRankCompression([0.6, 0.4], [1, 2], snapshots=snapshots, show_table=False)
        watch = new_watch()
        trainer, said = fit_with_warnings(fit, new_module(), compression, watch, default_root_dir=root)
        assert len(said) == snapshots
        assert watch.first(0) > watch.first(1) > watch.first(2)
        assert compression.snapshot_files == {} and compression.state_dict()["applied"] == [1, 2]
        ends.append(trainer.lightning_module.state_dict())
        if said:
            assert f"the snapshot dense.ckpt in {root / 'compression'} could not be written (NotADirect" in said[0]
            assert "The training goes on" in said[0] and "`default_root_dir`" in said[0]
    assert same(*ends)


def test_place_of_the_snapshots_that_is_taken_beside_a_logger_that_writes(fit, new_module, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "compression").write_text("mine")
    compression = LowRankCompression(0.4, 1, snapshots=True, show_table=False)
    _, said = fit_with_warnings(fit, new_module(), compression, logger=logger)
    [text] = said
    assert "FileExistsError" in text
    assert (tmp_path / "run" / "compression").read_text() == "mine"
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_smoke_test_without_room_for_its_scratch_folder_goes_on(fit, new_module, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    compression = LowRankCompression(0.4, 5, snapshots=True, show_table=False)
    _, [text] = fit_with_warnings(fit, new_module(), compression, fast_dev_run=True)
    assert "the snapshot dense.ckpt in a scratch folder could not be written (FileNotFoundError" in text
    assert compression.allocation is not None


class Spoilt(Callback):
    """Put a file where the folder of the snapshots was, once there are some."""

    def on_train_epoch_start(self, trainer, *_):
        folder = Path(trainer.default_root_dir) / "compression"
        if trainer.current_epoch == 2:
            assert sorted(one.name for one in folder.iterdir()) == ["cut.ckpt", "dense.ckpt"]
            folder.rename(folder.with_name("moved"))
            folder.touch()


def test_snapshot_of_an_earlier_moment_is_not_taken_for_the_one_that_is_left_out(fit, new_module):
    compression = LowRankCompression([0.6, 0.4], [1, 2], snapshots=True, show_table=False)
    with pytest.warns(UserWarning, match=r"cut\.ckpt in .* could not be written \(FileExistsError"):
        fit(new_module(), Spoilt(), compression)
    assert list(compression.snapshot_files) == ["dense"]


READ_ONLY = """
import sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lr_callback import ALDS, LowRankCompression

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

try:
    open(sys.argv[1] + "/probe", "w").close()
except PermissionError:
    print("it is read-only")
data = DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(4, (32,))), batch_size=16)
compression = LowRankCompression(0.5, [1, 2], method=ALDS(), refit=None, snapshots=True)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Trainer(max_epochs=4, accelerator="cpu", default_root_dir=sys.argv[1], callbacks=[compression], **quiet).fit(
        Module(), data)
said = [str(one.message) for one in caught if "could not be written" in str(one.message)]
print(len(said), "warning", "PermissionError" in said[0], compression.state_dict()["applied"])
"""


def test_read_only_log_folder_ends_no_training(tmp_path):
    root, command = tmp_path / "kept", [sys.executable, "-c", READ_ONLY]
    root.mkdir(mode=0o555)
    if os.geteuid() == 0:  # to whom permissions say nothing, unless it gives that up
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root writes anywhere, and there is no `setpriv` to be less than that")
        command = [setpriv, "--bounding-set=-dac_override", *command]
    done = subprocess.run([*command, str(root)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "it is read-only" in done.stdout
    assert "1 warning True [1, 2]" in done.stdout
    assert list(root.iterdir()) == []
