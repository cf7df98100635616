"""Semantic segmentation: torchvision's DeepLabV3 with a small body, compressed in the middle of its training.

    python examples/segmentation.py

The images are made up: a disc, a frame and a cross of any colour on noise; each pixel is to be told which it belongs
to. It shows the table of the layers, the dilated ones of ASPP among them, and prints the mean intersection over union
on other images: of a network that stays dense, of one before its cut, right after it, and at the end. Less than half a
minute of a CPU core.
"""

import tempfile
from collections import OrderedDict

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3
from torchvision.ops import Conv2dNormActivation as Convolution

import lr_callback as lrc

SIZE, CLASSES = 32, 4


def pictures(number: int, seed: int) -> TensorDataset:
    """Return images ``(number, 3, SIZE, SIZE)`` and the class of each pixel, ``(number, SIZE, SIZE)``; 0 is noise."""
    draw = torch.Generator().manual_seed(seed)
    images, masks = torch.rand(number, 3, SIZE, SIZE, generator=draw), torch.zeros(number, SIZE, SIZE, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for image, mask in zip(images, masks, strict=True):
        for kind in (torch.randperm(CLASSES - 1, generator=draw) + 1).tolist():
            row, column = torch.randint(5, SIZE - 5, (2,), generator=draw).tolist()
            radius = int(torch.randint(5, 9, (1,), generator=draw))
            down, right = (rows - row).abs(), (columns - column).abs()
            inside = [
                down**2 + right**2 <= radius**2,
                (torch.maximum(down, right) <= radius) & (torch.maximum(down, right) >= radius - 2),
                (torch.maximum(down, right) <= radius) & (torch.minimum(down, right) <= radius // 4),
            ][kind - 1]
            mask[inside] = kind
            image[:, inside] = 0.3 * image[:, inside] + torch.rand(3, 1, generator=draw)
    return TensorDataset(images, masks)


class Body(nn.Sequential):
    """What DeepLabV3 sees the images through, at half of their size."""

    def __init__(self) -> None:
        widths = [(3, 16, 2), (16, 32, 1), (32, 48, 1), (48, 48, 1)]
        super().__init__(*(Convolution(given, made, stride=stride) for given, made, stride in widths))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features by the name that DeepLabV3 asks for."""
        return OrderedDict(out=super().forward(images))


class Segmentation(LightningModule):
    """DeepLabV3, trained with the mean over the pixels of the cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.Sequential(ASPP(48, [2, 3, 4], 32), Convolution(32, 32), nn.Conv2d(32, CLASSES, 1))
        self.network = DeepLabV3(Body(), head)
        self.mean_iou = MulticlassJaccardIndex(CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return functional.cross_entropy(self.network(batch[0])["out"], batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the mean intersection over union of the classes."""
        self.mean_iou.update(self.network(batch[0])["out"], batch[1])
        self.log("mean_iou", self.mean_iou)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: str) -> None:
    """Run the example, its files in a folder."""
    compression = lrc.LowRankCompression(keep_ratio=0.25, epochs=6, snapshots=True)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    for name, callbacks in {"dense control": [], "compressed": [compression]}.items():
        seed_everything(0, verbose=False)
        model = Segmentation()
        trainer = Trainer(accelerator="cpu", max_epochs=10, default_root_dir=folder, callbacks=callbacks, **quiet)
        trainer.fit(model, DataLoader(pictures(300, seed=1), batch_size=8, shuffle=True))
        for stage, file in (compression.snapshot_files if callbacks else {name: None}).items():
            [result] = trainer.test(model, DataLoader(pictures(100, seed=2), 50), ckpt_path=file, verbose=False)
            kept = sum(parameter.numel() for parameter in model.parameters())
            print(f"{stage}: mean IoU {result['mean_iou']:.3f} with {kept:,} parameters")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
