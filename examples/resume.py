"""A run breaks down after its compression and goes on in a new process, to the very weights of one that did not.

    python examples/resume.py

It prints how many parameters the last checkpoint has, what the new process begins with, and that all weights in the end
are the same, bit for bit. A checkpoint holds no random state; so the order of the images depends on the epoch alone,
and nothing else is drawn. It needs scikit-learn (``pip install -e '.[examples]'``) for its images, and less than half a
minute of one CPU core.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier


class DigitsByEpoch(DigitsData):
    """Serve the images in an order that depends on the number of the epoch alone."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Return a loader with a sampler that Lightning tells the epoch."""
        loader = super().train_dataloader()
        sampler = DistributedSampler(loader.dataset, num_replicas=1, rank=0, seed=0)
        return DataLoader(loader.dataset, self.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


class OutageError(RuntimeError):
    """The run breaks down."""


class Outage(Callback):
    """Break down in the middle of epoch 5."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Break down, if it is time."""
        if (trainer.current_epoch, batch_idx) == (5, 7):
            raise OutageError


def train(folder: Path, *others: Callback, checkpoint: Path | None = None) -> ImageClassifier:
    """Train for seven epochs, compressed at the start of epoch 3; or what is left of them after a checkpoint."""
    seed_everything(0)
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=8), learning_rate=0.05, schedule="cosine")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=7,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lrc.LowRankCompression(keep_ratio=0.4, epochs=3, show_table=False),
            ModelCheckpoint(folder, save_last=True),
            *others,
        ],
    )
    trainer.fit(model, DigitsByEpoch(augment=False), ckpt_path=checkpoint)
    return model


def parameters(weights: dict[str, torch.Tensor]) -> int:
    """Return the number of weights, without buffers."""
    return sum(one.numel() for name, one in weights.items() if name.endswith(("weight", "bias")))


def go_on(folder: Path) -> None:
    """Resume from the last checkpoint: the dense model that the code makes takes its structure."""
    file = folder / "last.ckpt"
    found = torch.load(file, weights_only=True)
    print(f"new process: begins with epoch {found['epoch'] + 1}, {parameters(found['state_dict']):,} parameters")
    torch.save(train(folder, checkpoint=file).state_dict(), folder / "end.pt")


def main(folder: Path) -> None:
    """Run the example, its files in a folder."""
    whole = train(folder / "whole").state_dict()
    try:
        train(folder / "parts", Outage())
    except OutageError:
        print("the second run broke down in epoch 5")
    subprocess.run([sys.executable, __file__, "--resume", folder / "parts"], check=True)
    resumed = torch.load(folder / "parts" / "end.pt", weights_only=True)
    same = whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    print(f"uninterrupted: {parameters(whole):,} parameters; same weights, bit for bit: {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="what the new process is started with")
    arguments = parser.parse_args()
    if arguments.resume:
        go_on(arguments.resume)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
