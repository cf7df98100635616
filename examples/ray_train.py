"""Low-rank compression in Ray Train: a TorchTrainer starts the workers, each of which runs a Lightning Trainer.

    pip install 'lr_callback[ray]'
    python examples/ray_train.py

Ray's strategy is DDP, and the callback takes it for that. It prints the parameters before and after, and the accuracy
on the validation images. It needs scikit-learn (``pip install -e '.[examples]'``) for its images, and about a minute of
two free CPU cores, most of it for Ray's start.
"""

import argparse
import tempfile
from typing import Any

import ray
from lightning.pytorch import Trainer, seed_everything
from ray import train
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier


def work(config: dict[str, Any]) -> None:
    """Train on one worker."""
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        max_epochs=config["epochs"],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=[
            lrc.LowRankCompression(keep_ratio=0.3, epochs=config["epochs"] // 2),
            RayTrainReportCallback(),  # hands the metrics and a checkpoint of each epoch to Ray
        ],
    )
    trainer = prepare_trainer(trainer)
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=16), learning_rate=0.05, schedule="cosine")
    trainer.fit(model, DigitsData())


def main(epochs: int, folder: str) -> None:
    """Train on two workers; then take the compressed network out of the last checkpoint."""
    ray.init(num_cpus=2, include_dashboard=False)
    host = TorchTrainer(
        work,
        train_loop_config={"epochs": epochs},
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(storage_path=folder),
    )
    result = host.fit()
    ray.shutdown()
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=16))
    dense = sum(parameter.numel() for parameter in model.parameters())
    with result.checkpoint.as_directory() as checkpoint:
        lrc.restore_(model, f"{checkpoint}/{RayTrainReportCallback.CHECKPOINT_NAME}")
    kept = sum(parameter.numel() for parameter in model.parameters())
    print(f"2 workers: {dense:,} -> {kept:,} parameters, val_accuracy {result.metrics['val_accuracy']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.epochs, temporary)
