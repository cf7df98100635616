from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier

pytest.importorskip("sklearn")

pytestmark = [
    # On a machine with many cores Lightning advises worker processes; for 8 x 8 images in memory they only cost time.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 still asks for PyTorch's LeafSpec, which PyTorch has deprecated: nothing a caller can change.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


class Rates(Callback):
    """Note the learning rate and the training loss of each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "devices": 1}
    return pl.Trainer(**{"default_root_dir": folder, "enable_checkpointing": False, **quiet, **settings})


def network() -> nn.Module:
    return CifarResNet(8, in_channels=1, width=4)


def rates(folder: Path, epochs: int, **settings: Any) -> list[float]:
    noted = Rates()
    model = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), learning_rate=0.1, **settings)
    trainer(folder, max_epochs=epochs, limit_train_batches=1, limit_val_batches=0, callbacks=[noted]).fit(
        model, DigitsData()
    )
    return noted.rates


def test_training_lowers_the_loss_and_logs_every_metric(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    noted = Rates()
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=10, callbacks=[noted])
    model, data = ImageClassifier(network(), learning_rate=0.05), DigitsData()
    before = run.validate(model, data, verbose=False)[0]
    run.fit(model, data)
    after = run.callback_metrics
    assert noted.losses[1] < noted.losses[0]
    assert after["val_loss"] < before["val_loss"] and after["val_accuracy"] > before["val_accuracy"]
    assert set(after) == {"train_loss", "val_loss", "val_accuracy"}
    assert set(run.test(model, data, verbose=False)[0]) == {"test_loss", "test_accuracy"}


def test_accuracy_is_the_share_of_right_images_over_uneven_batches_and_classes(tmp_path: Path) -> None:
    class SaysOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.ones(len(x), dtype=torch.long, device=x.device), 10).float()

    data = DigitsData(batch_size=100)
    result = trainer(tmp_path).test(ImageClassifier(SaysOne()), data, verbose=False)[0]
    assert result["test_accuracy"] == pytest.approx((data.test_data.labels == 1).float().mean().item())


def test_constant_rate(tmp_path: Path) -> None:
    assert rates(tmp_path, 3) == [0.1] * 3


def test_cosine_falls_to_zero_at_the_end(tmp_path: Path) -> None:
    assert rates(tmp_path, 4, schedule="cosine") == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)


def test_multistep_falls_at_the_milestones(tmp_path: Path) -> None:
    noted = rates(tmp_path, 5, schedule="multistep", milestones=(2, 4), gamma=0.5)
    assert noted == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_warmup_grows_linearly_before_the_schedule(tmp_path: Path) -> None:
    assert rates(tmp_path, 4, warmup_epochs=2) == pytest.approx([0.05, 0.1, 0.1, 0.1])
    noted = rates(tmp_path, 4, warmup_epochs=2, schedule="cosine")
    assert noted == pytest.approx([0.05, 0.1, 0.1, 0.05])


def test_optimizers_get_their_settings() -> None:
    settings: dict[str, Any] = {"learning_rate": 0.2, "momentum": 0.8, "weight_decay": 0.03}
    sgd = configured(ImageClassifier(network(), **settings))
    assert isinstance(sgd, torch.optim.SGD)
    assert {name: sgd.defaults[name] for name in ("momentum", "weight_decay", "nesterov")} == {
        "momentum": 0.8,
        "weight_decay": 0.03,
        "nesterov": False,
    }
    adamw = configured(ImageClassifier(network(), optimizer="adamw", **settings))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["weight_decay"] == 0.03 and adamw.param_groups[0]["initial_lr"] == 0.2


def configured(model: ImageClassifier) -> torch.optim.Optimizer:
    model.trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    settings = model.configure_optimizers()
    assert isinstance(settings, dict)
    return settings["optimizer"]


def test_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1, enable_checkpointing=True)
    run.fit(ImageClassifier(network(), schedule="cosine"), DigitsData())
    (path,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert any(key.startswith("network.layer1.0") for key in saved["state_dict"])


def test_resumed_run_follows_the_schedule_from_where_it_stopped(tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"schedule": "multistep", "milestones": (3,)}
    first = trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=1)
    first.fit(ImageClassifier(network(), **schedule), DigitsData())
    first.save_checkpoint(tmp_path / "last.ckpt")
    noted = Rates()
    more = trainer(tmp_path, max_epochs=4, limit_train_batches=2, limit_val_batches=1, callbacks=[noted])
    model = ImageClassifier(network(), **schedule)
    more.fit(model, DigitsData(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert noted.rates == pytest.approx([0.1, 0.01])


def test_cosine_without_an_end_is_refused(tmp_path: Path) -> None:
    model = ImageClassifier(network(), schedule="cosine")
    with pytest.raises(ValueError, match="`max_epochs` above warmup_epochs=0, got -1; set it"):
        trainer(tmp_path, max_epochs=-1, max_steps=5).fit(model, DigitsData())


def test_multistep_without_milestones_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule='multistep' needs `milestones`, got none; name"):
        ImageClassifier(network(), schedule="multistep")


def test_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="`warmup_epochs` must be at least 0, got -1"):
        ImageClassifier(network(), warmup_epochs=-1)


def test_channels_last_gives_the_same_scores_from_images_laid_out_so() -> None:
    seen: list[torch.Tensor] = []
    model = ImageClassifier(network(), channels_last=True).eval()
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model(images), model.network(images), atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].stride() != seen[1].stride()
