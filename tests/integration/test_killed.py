"""A process that is killed while it compresses or writes loses nothing that was saved.

Run as a program, this file trains in processes of its own, waits until one is at a certain place, and kills it there.
"""

import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lr_callback import ALDS, LowRankCompression, restore_

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
EPOCHS = 4
FSSPEC = "fsspec.implementations.local"
"""What Lightning writes files with."""


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.network(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(root: Path, ckpt_path: Path | None = None) -> Trainer:
    """Train with two compressions; one file is written over and over, the others stay."""
    files = ModelCheckpoint(root, "{epoch}", save_top_k=-1, save_last=True)
    compression = LowRankCompression([0.7, 0.5], [1, 3], method=ALDS(), refit=None, show_table=False, snapshots=True)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, default_root_dir=root, callbacks=[compression, files], **quiet
    )
    data = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    trainer.fit(Net(), DataLoader(TensorDataset(data), 8), ckpt_path=ckpt_path)
    return trainer


def stopping(function: Callable[..., Any], ready: Path, when: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that says that it was reached and waits there for ever."""

    def called(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            if function.__name__ == "write":
                function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                arguments[0].flush()
            ready.touch()
            time.sleep(600)
        return function(*arguments, **named)

    return called


def third(path: str) -> bool:
    """Return whether the file that is written over and over is about to be so in the third epoch."""
    return Path(path).name == "last.ckpt" and Path(path).with_name("epoch=2.ckpt").exists()


def call(number: int) -> Callable[..., bool]:
    calls = iter(range(1, 1000))
    return lambda *_: next(calls) == number


PLACES = {
    "half of the file is written": (
        "fsspec.implementations.local.LocalFileOpener.write",
        lambda opener, _: third(opener.path),
    ),
    "the file takes its name": ("fsspec.implementations.local.shutil.move", lambda _, path: third(path)),
    "a snapshot takes its name": ("pathlib.Path.replace", call(3)),
    "in the analysis": ("lr_callback.host.scope.analyze", call(2)),
    "layers are swapped": ("lr_callback.edits.surgery._report", call(2)),
}
"""Where a process is killed: a function, and at which of its calls."""


def kill_at(root: Path, place: str, when: Callable[..., bool]) -> None:
    """Train in a process of its own, and kill that at a place of the second compression or before it."""
    ready = root / "ready"
    root.mkdir()
    if not (child := os.fork()):
        owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
        setattr(owner, name, stopping(getattr(owner, name), ready, when))
        train(root)
        os._exit(3)
    while not ready.exists() and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the killed runs, one in a folder for each place."""
    root = tmp_path_factory.mktemp("killed")
    # Lightning writes a file here first and moves it; on another disk that would be a copy, which can be cut off.
    where = {**os.environ, "TMPDIR": str(root)}
    subprocess.run([sys.executable, __file__, str(root)], check=True, timeout=240, env=where)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return dict(train(tmp_path_factory.mktemp("whole")).lightning_module.state_dict())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.situation("Checkpoints", "SIGKILL while a file is written or layers are replaced", "works")
def test_all_that_was_saved_is_whole_and_resumes_bit_for_bit(killed, whole, place):
    root = killed / place
    files = sorted(root.rglob("*.ckpt"))
    assert {file.name for file in files} == {
        "epoch=0.ckpt",
        "epoch=1.ckpt",
        "epoch=2.ckpt",
        "last.ckpt",
        "dense.ckpt",
        "cut.ckpt",
    }
    for file in files:
        restore_(Net(), file)
    assert (root / "compression" / "cut.ckpt.part").exists() is (place == "a snapshot takes its name")
    written = 1 if place in ("half of the file is written", "the file takes its name") else 2
    assert torch.load(root / "last.ckpt", weights_only=True)["epoch"] == written  # the former file or the new one
    for file in (root / "last.ckpt", root / "epoch=2.ckpt"):
        ended = train(root, file).lightning_module.state_dict()
        assert list(ended) == list(whole)
        assert all(torch.equal(value, whole[name]) for name, value in ended.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, (place, when) in PLACES.items():
        kill_at(Path(sys.argv[1]) / title, place, when)
