"""What the runs on several processes share: a small network, its Trainer, and fingerprints of every bit."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from lr_callback import ALDS, LowRankCompression
from lr_callback.layers import FactorizedLayer

BATCH = 4
EPOCHS = 4
RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
SIZE = int(os.environ.get("WORLD_SIZE", "2"))


def data(size: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 2, 4, 4, generator=generator)
    return TensorDataset(images, torch.randint(4, (size,), generator=generator))


def network(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )


class Module(LightningModule):
    """A small network; ``now_and_then`` has a branch that only every second batch uses."""

    def __init__(
        self, manual: bool = False, now_and_then: bool = False, norm: bool = False, adam: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.network = network(norm)
        self.adam = adam
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.branch = nn.Linear(32, 4) if now_and_then else None

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        scores = self(batch[0])
        if self.branch is not None and batch_idx % 2:
            scores = scores + self.branch(batch[0].flatten(1))
        loss = F.cross_entropy(scores, batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        made = Adam(self.parameters(), lr=0.01) if self.adam else SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(made, 0.9)}


def digest(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """Return a fingerprint of every bit."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(name.encode())
        if tensor is not None:
            total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def of_state(value: Any) -> Any:
    """Return nested dicts and lists with tensors replaced by their fingerprints."""
    if isinstance(value, Tensor):
        return digest([("", value)])
    if isinstance(value, dict):
        return {str(key): of_state(one) for key, one in value.items()}
    return [of_state(one) for one in value] if isinstance(value, (list, tuple)) else value


class Watch(Callback):
    """Take fingerprints of all gradients before each step and of all weights after each batch."""

    def __init__(self) -> None:
        self.grads: list[str] = []
        self.weights: list[str] = []
        self.sizes: list[int] = []
        self.messages: list[str] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.grads.append(digest((name, one.grad) for name, one in pl_module.named_parameters()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.weights.append(digest(pl_module.named_parameters()))
        self.sizes.append(sum(one.numel() for one in pl_module.parameters()))

    def seen(self, module: nn.Module) -> dict[str, Any]:
        factorized = [name for name, one in module.named_modules() if isinstance(one, FactorizedLayer)]
        return {"grads": self.grads, "weights": self.weights, "sizes": self.sizes, "factorized": factorized}


class OnEpoch(Callback):
    """Do something at the start of an epoch."""

    def __init__(self, epoch: int, do: Callable[[Trainer, LightningModule], None]) -> None:
        self.epoch, self.do = epoch, do

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.do(trainer, pl_module)


def trainer(*callbacks: Callback, strategy: Any = None, **settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": SIZE,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
        "strategy": DDPStrategy() if strategy is None else strategy,
    }
    return Trainer(**{**quiet, **settings})


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": BATCH, **settings})


def events(**settings: Any) -> LowRankCompression:
    return LowRankCompression([0.6, 0.35], [1, 3], **{"method": ALDS(), "refit": None, "show_table": False, **settings})


def run(
    *callbacks: Callback,
    module: Module | None = None,
    compression: Callback | None = None,
    batches: DataLoader[Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with two compressions and return what was seen."""
    module, watch = module or Module(), Watch()
    host = trainer(watch, *callbacks, compression or events(), **settings)
    host.fit(module, loader() if batches is None else batches)
    return watch.seen(module)


@contextmanager
def patched(where: object, name: str, value: object):
    old = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, old)


def failure(act: Callable[[], object]) -> dict[str, Any]:
    try:
        act()
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def folder() -> Path:
    """Return where the processes write."""
    return Path(sys.argv[1])


def write(name: str, who: object, found: dict[str, Any]) -> None:
    (folder() / f"{name}-{who}.json").write_text(json.dumps(found), encoding="utf-8")
