"""A small network on real digits, a Trainer that writes nothing by itself, and observers."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lr_callback import ALDS, LowRankCompression

collect_ignore_glob = ["ddp_*.py"]
"""Programs that the tests start, and what these share."""
BATCH = 64
BATCHES = 4


def plain_sgd(module: LightningModule) -> object:
    return SGD(module.parameters(), lr=0.05, momentum=0.9)


class DigitsModule(LightningModule):
    """A convolutional network with batch norm and dropout; ``optimize`` makes its optimizer and schedule."""

    def __init__(self, optimize: Callable[[LightningModule], Any] = plain_sgd, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(256, 32),
                nn.ReLU(),
                nn.Linear(32, 10),
            )
        self.optimize = optimize

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.log("constant", 1.0)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        scores = self(batch[0])
        self.log(f"{stage}_loss", F.cross_entropy(scores, batch[1]))
        self.log(f"{stage}_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        return self.optimize(self)


class Watch(Callback):
    """Note what the model and the optimizer are like at each batch, and at the end of each epoch."""

    def __init__(self) -> None:
        self.parameters: dict[tuple[int, int | str], int] = {}
        self.rates: list[list[float]] = []
        self.losses: list[float] = []
        self.strangers: list[str] = []
        self.first_weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.parameters[trainer.current_epoch, batch_idx] = count(pl_module)
        if batch_idx == 0:
            state = pl_module.state_dict()
            self.first_weights[trainer.current_epoch] = {name: value.clone() for name, value in state.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        held = [id(one) for group in trainer.optimizers[0].param_groups for one in group["params"]]
        if sorted(held) != sorted(map(id, pl_module.parameters())):
            self.strangers.append(f"epoch {trainer.current_epoch}, batch {batch_idx}")
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters[trainer.current_epoch, "end"] = count(pl_module)

    def first(self, epoch: int) -> int:
        """Return the number of parameters at the first batch of an epoch."""
        return self.parameters[epoch, 0]


class Resumable(DataLoader[Any]):
    """A loader that goes on after the batch where a checkpoint was written, as Lightning asks for."""

    done = 0
    start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["done"] % len(self)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> TensorDataset:
    """Return the first 256 images of scikit-learn's digits, ``(1, 8, 8)``, and their labels."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images[: BATCH * BATCHES]).float().unsqueeze(1) / 16
    return TensorDataset(images, torch.from_numpy(found.target[: BATCH * BATCHES]).long())


@pytest.fixture(scope="session")
def loader(digits: TensorDataset) -> Callable[..., DataLoader[Any]]:
    """Return a maker of loaders: four batches of 64 in the same order every time, unless shuffled."""

    def make(shuffle: bool = False) -> DataLoader[Any]:
        return Resumable(digits, batch_size=BATCH, shuffle=shuffle)

    return make


@pytest.fixture(scope="session")
def new_module() -> type[DigitsModule]:
    return DigitsModule


@pytest.fixture(scope="session")
def new_watch() -> type[Watch]:
    return Watch


@pytest.fixture(scope="session")
def new_trainer() -> Callable[..., Trainer]:
    """Return a maker of Trainers on the CPU that are silent and write nothing, unless told to."""

    def make(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "max_epochs": 3,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**{**quiet, "default_root_dir": root, "callbacks": list(callbacks), **settings})

    return make


@pytest.fixture
def fit(
    tmp_path: Path, loader: Callable[..., DataLoader[Any]], new_trainer: Callable[..., Trainer]
) -> Callable[..., Trainer]:
    """Return a function that trains a module with callbacks and returns the Trainer."""

    def run(module: LightningModule, *callbacks: Callback, shuffle: bool = False, **settings: Any) -> Trainer:
        trainer = new_trainer(tmp_path, *callbacks, **settings)
        trainer.fit(module, loader(shuffle), loader())
        return trainer

    return run


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Return the messages that Lightning's loggers get, whoever else shows them."""
    kept = _Kept()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in loggers:
        logger.addHandler(kept)
    yield kept.texts
    for logger in loggers:
        logger.removeHandler(kept)


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[str], dict[str, dict[int, float]]]:
    """Return a reader of CSVLogger's file: name of a metric -> step -> value."""

    def read(log_dir: str) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        with (Path(log_dir) / "metrics.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name != "step":
                        found.setdefault(name, {})[int(row["step"])] = float(value)
        return found

    return read


def is_same(one: Any, other: Any) -> bool:
    """Compare nested dicts and lists; tensors must be equal in every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Return a comparison of nested dicts, lists and tensors, in every bit."""
    return is_same


class Around(Callback):
    """Note weights and states by name just before and just after a cut at epoch 1, which is between two of these."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[list[dict[str, Any]]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        self.weights.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})
        names: dict[Any, str] = {one: name for name, one in pl_module.named_parameters()}
        states = [{names[one]: dict(state) for one, state in each.state.items()} for each in trainer.optimizers]
        self.states.append(copy.deepcopy(states))


@pytest.fixture
def trained(fit: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Return a function that trains for three epochs with a cut at epoch 1, and checks what holds of every such run.

    Factors have moved, nothing is infinite, what was not factorized stayed as it was, and so did its state.
    """

    def run(module: LightningModule, *callbacks: Callback, options: dict[str, Any], **settings: Any) -> Trainer:
        plain = {"method": ALDS(), "refit": None, "show_table": False}
        around, cut = Around(), LowRankCompression(0.5, 1, **{**plain, **options})
        trainer = fit(module, around, cut, around, *callbacks, max_epochs=3, **settings)
        (before, after), now = around.weights, dict(module.named_parameters())
        factors = [name for name in after if name not in before and name.endswith("coder.weight")]
        assert len(factors) >= 2
        assert [name for name in factors if torch.equal(now[name], after[name])] == []
        assert all(bool(one.isfinite().all()) for one in now.values())
        assert all(is_same(before[name], after[name]) for name in before.keys() & after.keys())
        for old, new in zip(*around.states, strict=True):
            if not any("func_evals" in state for state in old.values()):  # LBFGS: its history is of all weights at once
                assert all(is_same(state, new[name]) for name, state in old.items() if name in after)
        held = {id(one) for each in trainer.optimizers for group in each.param_groups for one in group["params"]}
        assert held == {id(one) for one in module.parameters()}
        assert all(set(map(id, each.state)) <= held for each in trainer.optimizers)
        return trainer

    return run
