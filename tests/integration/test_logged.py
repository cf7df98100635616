"""Accuracies that a run's own validations log stand in its loggers as those before and after a compression."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc

BEFORE, AFTER = "compression/accuracy_before", "compression/accuracy_after"
pytestmark = pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")


class Graded(LightningModule):
    """Its validation logs the epoch's number as the accuracy: what is logged when can be seen."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if "train_acc" in self.names:
            self.log("train_acc", loss.detach(), on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        for name in self.names:
            if name != "train_acc":
                self.log(name, self.current_epoch / 10)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def logged(tmp_path, names, limit=1.0, ratio=0.6, epochs=2, **callback):
    """Run four epochs, by default with a compression at the start of the third; return name -> (step, latest value)."""
    told = {}

    class Noting(CSVLogger):
        def log_metrics(self, metrics, step=None):
            told.update({name: (step, value) for name, value in metrics.items() if name in (BEFORE, AFTER)})
            super().log_metrics(metrics, step)

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(4, (32,))), batch_size=8)
    compression = lrc.LowRankCompression(ratio, epochs, method=lrc.ALDS(), refit=None, show_table=False, **callback)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=Noting(tmp_path),
        callbacks=[compression],
        limit_val_batches=limit,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Graded(names), loader, loader)
    return told


@pytest.mark.parametrize(
    ("names", "monitor"),
    [(["val_acc"], None), (["val_acc", "train_acc"], None), (["acc"], None), (["val_acc", "val_acc_top5"], "val_acc")],
)
def test_they_are_of_the_validations_on_both_sides(tmp_path, names, monitor):
    # Four steps an epoch: the compression is at step 8, the validation after it at the end of epoch 2.
    assert logged(tmp_path, names, monitor=monitor) == {
        BEFORE: (8, pytest.approx(0.1)),
        AFTER: (11, pytest.approx(0.2)),
    }


def test_a_second_compression_has_its_own(tmp_path):
    told = logged(tmp_path, ["val_acc"], ratio=[0.8, 0.6], epochs=[1, 3])
    assert told == {BEFORE: (12, pytest.approx(0.2)), AFTER: (15, pytest.approx(0.3))}


@pytest.mark.parametrize("names", [["val_loss"], ["val_acc", "val_acc_top5"]], ids=["none", "two"])
def test_none_is_logged_where_it_cannot_be_told(tmp_path, names):
    assert logged(tmp_path, names) == {}


def test_none_is_logged_without_a_validation(tmp_path):
    assert logged(tmp_path, ["val_acc"], limit=0) == {}
