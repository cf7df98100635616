"""Snapshots: where they are written, and where nothing is."""

import gc
from pathlib import Path

import pytest

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
