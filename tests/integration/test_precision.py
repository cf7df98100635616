"""Mixed precision: what is measured after a step runs as the step did."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.decisions.costs import COUNTED


class TwoParts(pl.LightningModule):
    """A step that calls two parts: the second gets what autocast made of the first."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        nn.init.zeros_(self.head.weight)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("cost", COUNTED)
def test_a_step_in_two_parts_is_counted_under_autocast_and_a_zero_head_is_no_hindrance(cost, tmp_path):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 32), torch.randint(4, (64,))), batch_size=16)
    callback = lrc.LowRankCompression(0.6, epochs=1, cost=cost)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    model = TwoParts()
    trainer.fit(model, data)
    dense = 16 * (32 * 64 + 64 * 4)
    kept = float(trainer.callback_metrics["compression/kept_multiply_adds"])
    parts = [model.get_submodule(name) for name in callback.allocation.factorized]
    saved = sum(part.weight.numel() - sum(factor.numel() for factor in part.factors) for part in parts)
    assert parts and kept == pytest.approx(1 - 16 * saved / dense, abs=1e-6)
