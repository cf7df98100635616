"""Fine-tuning callbacks freeze, unfreeze and remember parameters by name; a compression keeps them right."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.optim import SGD

from lr_callback import ALDS, FactorizedConv2d, FactorizedLinear, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
]
EPOCHS, UNFREEZE = 6, 3


@pytest.fixture
def new_split(new_module):
    """Return a maker of modules with a backbone and a head; only what is trainable is in the optimizer."""

    class Split(new_module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.network[:9], self.network[9:]
            del self.network

        def forward(self, images):
            return self.head(self.backbone(images))

        def configure_optimizers(self):
            return SGD([one for one in self.parameters() if one.requires_grad], lr=0.05, momentum=0.9)

    return Split


def backbone():
    return BackboneFinetuning(UNFREEZE, backbone_initial_lr=0.01, train_bn=True, should_align=True)


class LayerByLayer(BaseFinetuning):
    """Unfreeze one layer of the backbone at the start of each of two epochs."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        for at, index in ((2, 8), (UNFREEZE, 3)):
            if epoch == at:
                self.unfreeze_and_add_param_group(pl_module.backbone[index], optimizer, lr=0.02)


class Groups(Callback):
    """Note what is in the optimizer and should not be, or the other way round, and what did not move in an epoch."""

    def __init__(self):
        self.still, self.strangers = {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.values = {name: one.detach().clone() for name, one in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer, pl_module):
        held = [one for group in trainer.optimizers[0].param_groups for one in group["params"]]
        wanted = {id(one) for one in pl_module.parameters() if one.requires_grad}
        if {id(one) for one in held} != wanted or len(held) != len(wanted):
            self.strangers.append(trainer.current_epoch)
        named = dict(pl_module.named_parameters())
        still = [name for name, one in named.items() if torch.equal(one, self.values[name])]
        self.still[trainer.current_epoch] = [name for name in still if named[name].requires_grad]


def compression(*epochs):
    plain = {"method": ALDS(), "refit": None, "show_table": False}
    return LowRankCompression([0.7, 0.45][: len(epochs)], list(epochs), **plain)


WHEN = {
    "before it is unfrozen": (1,),
    "in the same epoch": (UNFREEZE,),
    "after": (4,),
    "twice": (1, 4),
    "at once": (0, UNFREEZE),
}


@pytest.mark.situation("Other callbacks", "BackboneFinetuning and BaseFinetuning", "works")
@pytest.mark.parametrize("kind", [backbone, LayerByLayer])
@pytest.mark.parametrize("epochs", WHEN.values(), ids=WHEN)
@pytest.mark.parametrize("first", [True, False], ids=["fine-tuning first", "compression first"])
def test_what_is_unfrozen_trains_and_the_record_names_what_is_in_the_optimizer(fit, new_split, kind, epochs, first):
    watch, tuning, module = Groups(), kind(), new_split()
    order = [tuning, compression(*epochs)] if first else [compression(*epochs), tuning]
    trainer = fit(module, *order, watch, max_epochs=EPOCHS)
    assert watch.strangers == []
    assert all(still == [] for still in watch.still.values())
    assert any(isinstance(one, (FactorizedLinear, FactorizedConv2d)) for one in module.modules())
    frozen = [name for name, one in module.named_parameters() if not one.requires_grad]
    assert (frozen == []) is (kind is backbone)
    names = {parameter: name for name, parameter in module.named_parameters()}
    recorded = [group["params"] for group in tuning._internal_optimizer_metadata[0]]
    assert recorded == [[names[one] for one in group["params"]] for group in trainer.optimizers[0].param_groups]


class Thaw(Callback):
    """Unfreeze what a resumed fine-tuning has frozen again: Lightning's own defect, with or without a compression.

    ``BaseFinetuning.setup`` freezes before training, also in a run that is resumed, and nothing unfreezes what was
    unfrozen before the file was written; https://github.com/Lightning-AI/pytorch-lightning/issues/21901.
    """

    def on_train_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            for one in group["params"]:
                one.requires_grad_(True)


def finished(trainer):
    return trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.situation("Other callbacks", "BackboneFinetuning and BaseFinetuning, resumed", "works")
@pytest.mark.parametrize("kind", [backbone, LayerByLayer])
@pytest.mark.parametrize("epochs", WHEN.values(), ids=WHEN)
@pytest.mark.parametrize("first", [True, False], ids=["fine-tuning first", "compression first"])
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    fit, new_split, new_trainer, loader, tmp_path, kind, epochs, first
):
    def callbacks():
        return [kind(), compression(*epochs)] if first else [compression(*epochs), kind()]

    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(new_split(), *callbacks(), every, max_epochs=EPOCHS, enable_checkpointing=True)
    end = copy.deepcopy(finished(whole))
    for epoch in (2, 4):
        again = new_trainer(tmp_path, *callbacks(), Thaw(), max_epochs=EPOCHS)
        again.fit(new_split(), loader(), loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for resumed, uninterrupted in zip(finished(again), end, strict=True):
            assert same(resumed, uninterrupted)


@pytest.mark.parametrize("compressed", [True, False])
def test_resumed_backbone_is_frozen_again_by_lightning_with_and_without_a_compression(
    fit, new_split, new_trainer, loader, tmp_path, compressed
):
    def callbacks():
        return [backbone(), *([compression(4)] if compressed else [])]

    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(new_split(), *callbacks(), every, max_epochs=EPOCHS, enable_checkpointing=True)
    module = new_split()
    again = new_trainer(tmp_path, *callbacks(), max_epochs=EPOCHS)
    again.fit(module, loader(), loader(), ckpt_path=tmp_path / "epoch=4.ckpt")
    frozen = [name for name, one in module.named_parameters() if not one.requires_grad]
    assert frozen == [name for name, _ in module.named_parameters() if name.startswith("backbone") and not (
        isinstance(module.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d))]  # fmt: skip


def test_record_is_as_before_when_the_cut_fails(fit, new_split, monkeypatch):
    tuning, module, seen = backbone(), new_split(), {}

    def fail(*_):
        seen["during"] = copy.deepcopy(tuning._internal_optimizer_metadata)
        raise MemoryError("injected")

    class Before(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen["before"] = copy.deepcopy(tuning._internal_optimizer_metadata)

    monkeypatch.setattr("lr_callback.host.cut.retire", fail)
    with pytest.raises(MemoryError, match="injected"):
        fit(module, tuning, Before(), compression(4), max_epochs=EPOCHS)
    assert tuning._internal_optimizer_metadata == seen["before"] != seen["during"]
