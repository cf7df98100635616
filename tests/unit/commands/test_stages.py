"""Snapshots measured side by side: with the loop that a model has, quietly, leaving nothing behind."""

import logging
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.commands.stages import TITLES, measure_stages
from lr_callback.files.hook import install_hook
from lr_callback.observation.report import spread_of

LOGGERS = ("lightning.pytorch", "lightning.fabric")


class Blank(LightningModule):
    """A module without any evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def loss(self, batch):
        return F.cross_entropy(self.network(batch[0]), batch[1])


class WithValidation(Blank):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


class WithTest(WithValidation):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8 * count, 32, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(8 * count) % 4), batch_size=8)


class OnlyValidation(LightningDataModule):
    def val_dataloader(self):
        return batches()


class Data(OnlyValidation):
    def test_dataloader(self):
        return batches()


@pytest.fixture
def trainer(tmp_path):
    return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False)


@pytest.fixture
def files(tmp_path):
    """Return the files of a dense network, of its cut and of a last state of that."""
    module, written = Blank(), {}
    for name in TITLES:
        if name == "cut":
            lrc.factorize_(module, lrc.allocate(module, 0.5))
        if name == "final":
            nn.init.zeros_(module.network[2].bias)
        written[name] = str(tmp_path / f"{name}.ckpt")
        torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, written[name])
    return written


def ready(kind):
    """Return a module as the callback leaves it behind: cut, and with the hook that adapts it to files."""
    module = kind()
    install_hook(module)
    lrc.factorize_(module, lrc.allocate(module, 0.5))
    return module


def expected_loss(file, count=3):
    module = Blank()
    lrc.restore_(module, file)
    with torch.no_grad():
        return float(torch.stack([module.loss(batch) for batch in list(batches())[:count]]).mean())


@pytest.mark.parametrize(
    ("kind", "data", "metric"),
    [(WithTest, Data, "test_loss"), (WithTest, OnlyValidation, "val_loss"), (WithValidation, Data, "val_loss")],
)
def test_each_stage_has_the_metrics_and_the_costs_of_its_file(trainer, files, tmp_path, kind, data, metric):
    stages = measure_stages(trainer, ready(kind), data(), files)
    assert [stage.name for stage in stages] == ["dense, before", "right after", "at the end"]
    for stage, file in zip(stages, files.values(), strict=True):
        assert stage.metrics == {metric: pytest.approx(expected_loss(file), rel=1e-6)}
        assert stage.milliseconds > 0 and stage.batch == "8x32 float32"
    dense, cut, final = stages
    assert dense.parameters == 32 * 24 + 24 + 24 * 4 + 4
    assert dense.multiply_adds == 8 * (32 * 24 + 24 * 4)
    assert final.parameters == cut.parameters <= 0.5 * dense.parameters
    assert final.multiply_adds == cut.multiply_adds < dense.multiply_adds
    assert [stage.file_bytes for stage in stages] == [(tmp_path / f"{name}.ckpt").stat().st_size for name in TITLES]


@pytest.mark.parametrize(("kind", "data"), [(Blank, Data), (Blank, None), (WithTest, None)])
def test_without_an_evaluation_there_are_sizes_only(trainer, files, kind, data):
    stages = measure_stages(trainer, ready(kind), data and data(), files)
    seen = [(stage.metrics, stage.multiply_adds, stage.milliseconds, stage.batch) for stage in stages]
    assert seen == [({}, 0, 0.0, "")] * 3
    assert stages[0].parameters > stages[1].parameters


def test_model_has_the_last_snapshot_and_no_hooks_afterwards(trainer, files):
    module = ready(WithTest)
    measure_stages(trainer, module, Data(), files)
    written = torch.load(files["final"], weights_only=True)["state_dict"]
    assert all(torch.equal(value, written[name]) for name, value in module.state_dict().items())
    assert all(not one._forward_hooks and not one._forward_pre_hooks for one in module.modules())


class Slowed(WithTest):
    """A network that takes longer and longer, as on a machine that gets busy."""

    def __init__(self):
        super().__init__()
        self.network.register_forward_pre_hook(Slowed.wait)

    made = 0

    @staticmethod
    def wait(*_):
        Slowed.made += 1
        time.sleep(2e-5 * Slowed.made)


def test_equal_structures_get_equal_times_whatever_comes_in_between(trainer, files):
    Slowed.made = 0
    stages = measure_stages(trainer, ready(Slowed), Data(), files)
    assert spread_of(stages) > 0
    dense, cut, final = (stage.milliseconds for stage in stages)
    assert final == pytest.approx(cut, rel=0.2) and dense == pytest.approx(cut, rel=0.2)


def test_module_that_cannot_be_copied_has_no_times_and_says_so_once(trainer, files):
    module = ready(WithTest)
    module.lock = threading.Lock()
    with pytest.warns(UserWarning, match=r"could not be copied \(TypeError: .*see `lr-callback report`") as warned:
        stages = measure_stages(trainer, module, Data(), files)
    assert [stage.milliseconds for stage in stages] == [0.0] * 3
    assert len([one for one in warned if "could not be copied" in str(one.message)]) == 1
    assert all(stage.metrics and stage.multiply_adds for stage in stages)


def test_stages_come_in_the_order_of_a_run_and_missing_ones_are_left_out(trainer, files):
    some = {name: files[name] for name in ("final", "dense")}
    assert [stage.name for stage in measure_stages(trainer, ready(WithTest), Data(), some)] == [
        "dense, before",
        "at the end",
    ]


def test_limits_of_the_run_hold_here_too(tmp_path, files):
    limited = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, limit_test_batches=1)
    [stage] = measure_stages(limited, ready(WithTest), Data(), {"dense": files["dense"]})
    assert stage.metrics == {"test_loss": pytest.approx(expected_loss(files["dense"], count=1), rel=1e-6)}
    assert expected_loss(files["dense"], count=1) != pytest.approx(expected_loss(files["dense"]), rel=1e-3)


@pytest.fixture
def records():
    """Return what Lightning's loggers let through."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    yield found
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(handler)


def test_nothing_is_shown_and_the_loggers_get_their_level_back(trainer, files, records, capsys):
    levels = [logging.getLogger(name).level for name in LOGGERS]
    records.clear()
    measure_stages(trainer, ready(WithTest), Data(), files)
    assert records == []
    assert capsys.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in LOGGERS] == levels


def test_loggers_get_their_level_back_after_an_error(trainer, files, tmp_path):
    levels = [logging.getLogger(name).level for name in LOGGERS]
    with pytest.raises(FileNotFoundError):
        measure_stages(trainer, ready(WithTest), Data(), {"dense": str(tmp_path / "gone.ckpt")})
    assert [logging.getLogger(name).level for name in LOGGERS] == levels
