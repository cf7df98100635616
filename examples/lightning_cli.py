"""Low-rank compression from a configuration, with a LightningCLI of your own.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml

The callback is named in ``trainer.callbacks`` of the YAML file; this program does not mention it. It prints the table
of the layers, and the accuracy on the validation images with the parameters that are left. It needs scikit-learn
(``pip install -e '.[examples]'``) for its images, and less than half a minute of one CPU core.
"""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lr_callback.recipes import DigitsData


class Digits(LightningModule):
    """A small network for grey images of 8 x 8 pixels.

    Args:
        width: features of the two hidden layers.
        learning_rate: of Adam.
    """

    def __init__(self, width: int = 256, learning_rate: float = 0.001) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        right = (self.network(images).argmax(dim=1) == labels).float()
        self.log("val_accuracy", right.mean(), prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    cli = LightningCLI(Digits, DigitsData)
    if cli.subcommand == "fit":
        kept = sum(parameter.numel() for parameter in cli.model.parameters())
        print(f"val_accuracy {float(cli.trainer.callback_metrics['val_accuracy']):.3f} with {kept:,} parameters")
