"""Low-rank compression in a Lightning Trainer: train, cut, fine-tune, then resume and test from the checkpoint.

    python examples/trainer.py

It prints the parameters of the dense network, after the cut, of the resumed run and of a restored model, and the
accuracy on the test images. It needs scikit-learn (``pip install -e '.[examples]'``) for its images, and less than half
a minute of one CPU core.
"""

import tempfile

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier


def model() -> ImageClassifier:
    """Return the dense model, as the code makes it."""
    return ImageClassifier(CifarResNet(depth=8, in_channels=1, width=16), learning_rate=0.05)


def trainer(max_epochs: int, folder: str) -> Trainer:
    """Return a Trainer that compresses at the start of epoch 8."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        default_root_dir=folder,
        log_every_n_steps=10,
        enable_progress_bar=False,
        callbacks=[lrc.LowRankCompression(keep_ratio=0.3, epochs=8), ModelCheckpoint(folder, save_last=True)],
    )


def parameters(of: ImageClassifier) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in of.parameters())


def main(folder: str) -> None:
    """Run the example, its files in a folder."""
    seed_everything(0)
    data = DigitsData()
    first, small = trainer(12, folder), model()
    print(f"dense: {parameters(small):,} parameters")
    first.fit(small, data)
    checkpoint = first.checkpoint_callback.last_model_path
    print(f"after epoch {first.current_epoch}: {parameters(small):,} parameters")

    # A dense model takes the structure of the checkpoint, and the optimizer its state.
    resumed, fresh = trainer(14, folder), model()
    resumed.fit(fresh, data, ckpt_path=checkpoint)
    print(f"resumed, after epoch {resumed.current_epoch}: {parameters(fresh):,} parameters")

    resumed.test(model(), data, ckpt_path=resumed.checkpoint_callback.last_model_path)

    # Elsewhere, without a Trainer:
    anywhere = model()
    lrc.restore_(anywhere, checkpoint)
    print(f"restored: {parameters(anywhere):,} parameters")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
