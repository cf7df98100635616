"""Supervised training of an image classifier: loss, accuracies, optimizer and learning-rate schedule."""

import math
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

Schedule = Literal["constant", "cosine", "multistep"]


class ImageClassifier(pl.LightningModule):
    """Train ``network`` with cross-entropy and log ``train_loss``, ``{val,test}_loss`` and ``{val,test}_accuracy``.

    Args:
        network: Maps images ``(batch, channels, height, width)`` to scores ``(batch, num_classes)``.
        num_classes: Number of classes.
        learning_rate: Rate after the warm-up and before any decay, above 0.
        momentum: Momentum of SGD; AdamW ignores it.
        weight_decay: L2 penalty for SGD, decoupled decay for AdamW.
        optimizer: ``"sgd"`` (without Nesterov) or ``"adamw"``.
        schedule: ``"constant"``; ``"cosine"``, down to 0 at the trainer's ``max_epochs``; or ``"multistep"``, times
            ``gamma`` at each of ``milestones``.
        milestones: Epochs at which ``"multistep"`` decays, counted from 0.
        gamma: Factor of ``"multistep"``.
        warmup_epochs: The rate grows linearly over this many first epochs; 0 for none.
        channels_last: Give the network its images with their channels as the last axis in memory. The scores are the
            same up to rounding. On a CPU the convolutions of many slices, which are grouped ones, are several times
            faster so.

    Raises:
        ValueError: ``schedule`` is ``"multistep"`` without ``milestones``, or ``warmup_epochs`` is negative.

    Example::

        >>> import torch
        >>> from lr_callback.recipes import CifarResNet, ImageClassifier
        >>> model = ImageClassifier(CifarResNet(depth=8, in_channels=1), learning_rate=0.05, schedule="cosine")
        >>> model(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        learning_rate: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        schedule: Schedule = "constant",
        milestones: tuple[int, ...] = (),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        _check_schedule(schedule, milestones, warmup_epochs)
        self.network = network
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.optimizer_name = optimizer
        self.schedule: Schedule = schedule
        self.milestones = milestones
        self.gamma = gamma
        self.warmup_epochs = warmup_epochs
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores ``(batch, num_classes)`` of ``images``."""
        scores: Tensor = self.network(images.to(memory_format=self.memory_format))
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch and log its mean over the epoch."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        scores = self(images)
        accuracy.update(scores, labels)
        loss = functional.cross_entropy(scores, labels)
        self.log(f"{stage}_loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule, which steps once an epoch.

        Raises:
            ValueError: The schedule is ``"cosine"`` and the trainer has no ``max_epochs`` beyond the warm-up.
        """
        epochs = self._decay_epochs()
        optimizer = self._optimizer()
        scheduler = LambdaLR(optimizer, lambda epoch: self._rate_factor(epoch, epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def _optimizer(self) -> Optimizer:
        if self.optimizer_name == "adamw":
            return AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return SGD(self.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def _decay_epochs(self) -> int:
        """Count the epochs after the warm-up, which only the cosine schedule has to know."""
        max_epochs = self.trainer.max_epochs
        if self.schedule != "cosine":
            return 0
        if max_epochs is None or max_epochs <= self.warmup_epochs:
            raise ValueError(
                "ImageClassifier: the cosine schedule needs the trainer's `max_epochs` above "
                f"warmup_epochs={self.warmup_epochs}, got {max_epochs}; set it, or choose another schedule."
            )
        return max_epochs - self.warmup_epochs

    def _rate_factor(self, epoch: int, decay_epochs: int) -> float:
        """Give the learning rate of ``epoch`` as a multiple of ``learning_rate``."""
        if epoch < self.warmup_epochs:
            return (epoch + 1) / self.warmup_epochs
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (epoch - self.warmup_epochs) / decay_epochs))
        if self.schedule == "multistep":
            return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        return 1.0


def _check_schedule(schedule: Schedule, milestones: tuple[int, ...], warmup_epochs: int) -> None:
    if schedule == "multistep" and not milestones:
        raise ValueError(
            "ImageClassifier: schedule='multistep' needs `milestones`, got none; "
            "name the epochs at which the learning rate falls, for example (91, 136)."
        )
    if warmup_epochs < 0:
        raise ValueError(f"ImageClassifier: `warmup_epochs` must be at least 0, got {warmup_epochs}; 0 means none.")
