"""Checkpoints of every moment of a run: resumed, tested, restored, and always bit for bit what was saved."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.files.hook import install_hook

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The callbacks that wrote the files are not needed to read them.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
EPOCHS = 5


def events():
    return LowRankCompression([0.6, 0.35], [1, 3], show_table=False)


def with_cosine(optimizer):
    return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}


def sgd(module):
    return SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam_cosine(module):
    return with_cosine(Adam(module.parameters(), lr=0.005))


def groups_by_name(module):
    """Choose groups by names, some of which a compressed model no longer has, in another order than the model's."""
    named = dict(module.named_parameters())
    head = [named.pop(name) for name in list(named) if name == "network.8.weight"]
    biases = [named.pop(name) for name in list(named) if name.endswith("bias")]
    groups = [{"params": head, "lr": 0.01}, {"params": [*named.values()]}, {"params": biases, "weight_decay": 0.0}]
    return with_cosine(SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3))


def made_before(module):
    return module.made


def build(new_module, optimize):
    """Return a module; with ``made_before``, as under LightningCLI's ``optimizer:``, its optimizer is older than it."""
    module = new_module(optimize)
    if optimize is made_before:
        module.made = with_cosine(Adam(module.parameters(), lr=0.005))
    return module


class AtEpochStart(Callback):
    """Save a checkpoint at the start of an epoch, so before or after a compression by the order of callbacks."""

    def __init__(self, name, epoch):
        self.name, self.epoch = name, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{self.name}.ckpt")


def every(root, name="{epoch}-{step}", **when):
    return ModelCheckpoint(root, name, save_top_k=-1, **when)


def finished(trainer):
    """Return all that a run leaves behind in the model, the optimizer and the schedule."""
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict(), schedules


@pytest.fixture(scope="module", params=[sgd, adam_cosine, groups_by_name, made_before], ids=lambda one: one.__name__)
def run(request, tmp_path_factory, loader, new_module, new_trainer):
    """Return an uninterrupted run with two events that wrote a checkpoint at many moments."""
    root = tmp_path_factory.mktemp("whole")
    writers = [every(root), every(root, "mid-{epoch}-{step}", every_n_train_steps=3)]
    module = build(new_module, request.param)
    trainer = new_trainer(root, events(), *writers, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    end = copy.deepcopy(finished(trainer))  # the module is used again
    return SimpleNamespace(root=root, optimize=request.param, module=module, end=end)


@pytest.fixture
def again(run, tmp_path, loader, new_module, new_trainer):
    """Return a function that resumes the run from a file, with everything made anew, to its end."""

    def resume(name, module=None):
        module = build(new_module, run.optimize) if module is None else module
        trainer = new_trainer(tmp_path, events(), max_epochs=EPOCHS)
        trainer.fit(module, loader(), loader(), ckpt_path=run.root / name)
        return trainer

    return resume


def dense_layers(module):
    return {name for name, one in module.named_modules() if type(one) in (nn.Linear, nn.Conv2d)}


MOMENTS = {
    "long before the cut": "mid-epoch=0-step=3.ckpt",
    "end of the last dense epoch": "epoch=0-step=4.ckpt",
    "in the epoch of the cut": "mid-epoch=1-step=6.ckpt",
    "end of the epoch of the cut": "epoch=1-step=8.ckpt",
    "between two cuts": "mid-epoch=2-step=9.ckpt",
    "just before the second cut": "epoch=2-step=12.ckpt",
    "in the epoch of the second cut": "mid-epoch=3-step=15.ckpt",
    "after both": "epoch=3-step=16.ckpt",
}


@pytest.mark.parametrize("name", MOMENTS.values(), ids=MOMENTS)
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(run, again, name, same):
    trainer = again(name)
    assert trainer.global_step == 4 * EPOCHS
    for resumed, uninterrupted in zip(finished(trainer), run.end, strict=True):
        assert same(resumed, uninterrupted)


def test_module_that_was_already_cut_goes_back_to_a_dense_file(run, again, same):
    assert type(run.module.network[8]) is lrc.FactorizedLinear
    trainer = again("epoch=0-step=4.ckpt", run.module)
    assert same(finished(trainer), run.end)


@pytest.mark.parametrize("place", ["before the cut", "at the cut"])
def test_file_written_in_the_very_hook_of_the_cut_loses_no_event(place, tmp_path, loader, new_module, new_trainer):
    saver, compression = AtEpochStart("now", 1), events()
    order = [saver, compression] if place == "before the cut" else [compression, saver]
    new_trainer(tmp_path, *order, max_epochs=4).fit(new_module(sgd), loader(), loader())
    written = torch.load(tmp_path / "now.ckpt", weights_only=True)
    assert ("network.8.encoder.weight" in written["state_dict"]) is (place == "at the cut")
    compression = events()
    again = new_trainer(tmp_path, compression, max_epochs=4)
    again.fit(new_module(sgd), loader(), loader(), ckpt_path=tmp_path / "now.ckpt")
    assert compression.state_dict()["applied"] == [1, 3]
    assert again.global_step == 16
    assert sum(parameter.numel() for parameter in again.lightning_module.parameters()) == compression.allocation.cost
    assert compression.allocation.keep_ratio == 0.35


FILES = [
    file for epoch in (0, 1, 4) for file in (f"epoch={epoch}-step={4 * epoch + 4}.ckpt", f"weights-epoch={epoch}.ckpt")
]
"""Whole files and files with weights only: dense, cut, and cut twice."""


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, loader, new_module, new_trainer):
    """Return the files of a run with SGD, and the validation metrics at the end of each epoch."""
    root, metrics = tmp_path_factory.mktemp("plain"), {}

    class Validated(Callback):
        def on_validation_end(self, trainer, pl_module):
            found = trainer.callback_metrics
            metrics[trainer.current_epoch] = {name: float(found[f"val_{name}"]) for name in ("loss", "accuracy")}

    writers = [every(root), every(root, "weights-{epoch}", save_weights_only=True, every_n_train_steps=4)]
    trainer = new_trainer(root, events(), Validated(), *writers, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(new_module(sgd), loader(), loader())
    return SimpleNamespace(root=root, metrics=metrics)


def epoch_of(name):
    return int(name.split("epoch=")[1][0])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", ["dense", "cut"])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_a_file_gives_the_metrics_of_its_epoch(
    plain_run, tmp_path, loader, new_module, new_trainer, name, start, stage
):
    module = new_module()
    if start == "cut":
        lrc.factorize_(module, lrc.allocate(module, 0.5))
    trainer = new_trainer(tmp_path, events())
    [found] = getattr(trainer, stage)(module, loader(), ckpt_path=plain_run.root / name, verbose=False)
    prefix = "val" if stage == "validate" else "test"
    expected = plain_run.metrics[epoch_of(name)]
    assert found == {f"{prefix}_{metric}": value for metric, value in expected.items()}
    assert all(map(math.isfinite, found.values()))
    assert (dense_layers(module) == dense_layers(new_module())) is (epoch_of(name) == 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whole", [True, False], ids=["LightningModule", "bare network"])
def test_restore_gives_a_fresh_model_structure_and_weights(plain_run, loader, new_module, name, whole, same):
    state = torch.load(plain_run.root / name, weights_only=True)["state_dict"]
    module = new_module()
    target = module if whole else module.network
    lrc.restore_(target, plain_run.root / name)
    assert same(dict(module.state_dict()), dict(state))
    images = next(iter(loader()))[0]
    other = new_module()
    install_hook(other)
    other.load_state_dict(state)
    assert torch.equal(module.eval()(images), other.eval()(images))


@pytest.mark.parametrize("name", FILES)
def test_files_hold_plain_data_only(plain_run, name):
    written = torch.load(plain_run.root / name, weights_only=True)
    assert ("callbacks" in written) is not name.startswith("weights")
    if "callbacks" in written:
        state = written["callbacks"]["LowRankCompression"]
        assert state["applied"] == [event for event in (1, 3) if event <= epoch_of(name)]
        assert (state["allocation"] is None) is (epoch_of(name) == 0)


def test_loading_a_file_twice_is_loading_it_once(plain_run, tmp_path, loader, new_module, new_trainer, same):
    module, compression, hooks = new_module(), events(), []
    found = []
    for _ in range(2):
        trainer = new_trainer(tmp_path, compression)
        trainer.test(module, loader(), ckpt_path=plain_run.root / "epoch=3-step=16.ckpt", verbose=False)
        found.append((list(module.modules()), {name: value.clone() for name, value in module.state_dict().items()}))
        hooks.append(len(module._load_state_dict_pre_hooks))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert hooks[0] == hooks[1]
    assert compression.allocation.keep_ratio == 0.35


def test_file_that_was_tested_does_not_reach_into_a_later_fit(plain_run, tmp_path, loader, new_module, new_trainer):
    compression = LowRankCompression(0.5, 1, method=lrc.ALDS(), refit=None)
    module = new_module(lambda one: SGD(one.network[10].parameters(), lr=0.1))
    trainer = new_trainer(tmp_path, compression)
    trainer.test(module, loader(), ckpt_path=plain_run.root / "epoch=0-step=4.ckpt", verbose=False)
    frozen = module.network[8].bias.clone()
    trainer.fit(module, loader(), loader())
    assert torch.equal(module.network[8].bias, frozen)
    assert {id(one) for one in trainer.optimizers[0].param_groups[0]["params"]} == {
        id(one) for one in module.network[10].parameters()
    }
    assert type(module.network[8]) is lrc.FactorizedLinear


@pytest.mark.parametrize(("name", "still_due"), [(FILES[0], [1, 3]), (FILES[2], [3]), (FILES[4], [])])
def test_resumed_run_compresses_only_at_events_that_are_still_due(
    plain_run, tmp_path, loader, new_module, new_trainer, messages, name, still_due
):
    trainer = new_trainer(tmp_path, LowRankCompression([0.6, 0.35], [1, 3]), max_epochs=EPOCHS)
    trainer.fit(new_module(sgd), loader(), loader(), ckpt_path=plain_run.root / name)
    tables = [text.splitlines()[0] for text in messages if text.startswith("Low-rank compression at")]
    assert tables == [f"Low-rank compression at the start of epoch {epoch}" for epoch in still_due]
