"""CIFAR-10, from torchvision's folder or from two PNG files and their labels."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

from lr_callback.recipes._images import Batch, ImageTensors, batches, stratified_order

# The values most CIFAR ResNets with public weights were trained with: ImageNet's, not CIFAR-10's own.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

_FOLDER: str = CIFAR10.base_folder
_LABELS = "cifar10_labels.npz"
_TEST = "cifar10_test_images.png"
_TRAIN = "cifar10_train8k_images.png"


class CIFAR10Data(pl.LightningDataModule):
    """Serve CIFAR-10: ten classes of colour images, ``(3, 32, 32)``, with labels 0 to 9.

    The test images are the official 10,000. Validation images are held out of the training images, each class in
    proportion, and ``seed`` alone chooses them.

    Args:
        data_dir: Folder that holds either ``cifar-10-batches-py`` (torchvision's and the official form) or the three
            files ``cifar10_test_images.png``, ``cifar10_train8k_images.png`` (images one below the other) and
            ``cifar10_labels.npz`` (``test_labels``, ``train8k_labels``). The folder wins if both are there.
        batch_size: Images per batch.
        num_workers: Worker processes per loader; batches are made with tensor operations, so few are needed.
        augment: Shift training images by at most 4 pixels and mirror them at random.
        download: Let torchvision fetch ``cifar-10-batches-py`` (170 MB) if neither form is there.
        train_limit: Train on at most this many images, each class in proportion; ``None`` for all.
        val_fraction: Share of the training images held out for validation, above 0 and below 1.
        seed: Chooses the validation images and those that ``train_limit`` keeps.

    Raises:
        ValueError: ``val_fraction`` is not between 0 and 1, or ``train_limit`` is below 1.

    Example::

        from lr_callback.recipes import CIFAR10Data

        data = CIFAR10Data("data/cifar10", download=True)
        data.prepare_data()
        data.setup()
        images, labels = next(iter(data.train_dataloader()))  # (128, 3, 32, 32) and (128,)
    """

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 128,
        *,
        num_workers: int = 0,
        augment: bool = True,
        download: bool = False,
        train_limit: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"CIFAR10Data: `val_fraction` must be above 0 and below 1, got {val_fraction}; try 0.1.")
        if train_limit is not None and train_limit < 1:
            raise ValueError(f"CIFAR10Data: `train_limit` must be at least 1, got {train_limit}; None means no limit.")
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.download = download
        self.train_limit = train_limit
        self.val_fraction = val_fraction
        self.seed = seed

    def prepare_data(self) -> None:
        """Fetch the images if that was asked for and neither form is there."""
        if self.download and not (_has_folder(self.data_dir) or _has_files(self.data_dir)):
            CIFAR10(self.data_dir, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Load what ``stage`` needs: ``"fit"``, ``"validate"``, ``"test"``, or ``None`` for everything.

        Raises:
            FileNotFoundError: ``data_dir`` holds neither form.
            RuntimeError: torchvision finds its folder incomplete or damaged.
            ValueError: A PNG file does not hold one 32 x 32 colour image per label.
        """
        if stage in (None, "fit", "validate"):
            self._split(*_load(self.data_dir, train=True))
        if stage in (None, "test"):
            self.test_data = _scaled(*_load(self.data_dir, train=False))

    def _split(self, images: Tensor, labels: Tensor) -> None:
        order = stratified_order(labels, self.seed)
        count = round(self.val_fraction * len(order))
        val, train = order[:count], order[count:][: self.train_limit]
        shift = 4 if self.augment else 0
        self.val_data = _scaled(images[val], labels[val])
        self.train_data = _scaled(images[train], labels[train], shift=shift, mirror=self.augment)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches."""
        return batches(self.train_data, self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return batches(self.val_data, self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return batches(self.test_data, self.batch_size, self.num_workers)


def _scaled(images: Tensor, labels: Tensor, shift: int = 0, mirror: bool = False) -> ImageTensors:
    return ImageTensors(images, labels, white=255, mean=_MEAN, std=_STD, shift=shift, mirror=mirror)


def _has_folder(data_dir: Path) -> bool:
    return (data_dir / _FOLDER).is_dir()


def _has_files(data_dir: Path) -> bool:
    return all((data_dir / name).is_file() for name in (_LABELS, _TEST, _TRAIN))


def _load(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images as uint8 ``(count, 3, 32, 32)`` and labels as int64 ``(count,)``."""
    if _has_folder(data_dir):
        official = CIFAR10(data_dir, train=train)
        pixels, labels = official.data, np.asarray(official.targets)
    elif _has_files(data_dir):
        pixels, labels = _load_files(data_dir, train)
    else:
        raise FileNotFoundError(
            f"CIFAR10Data: `data_dir` must hold the folder {_FOLDER}, or the files {_LABELS}, {_TEST} and {_TRAIN}; "
            f"found neither in {data_dir.absolute()}. Set `data_dir`, or download=True to fetch the folder."
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def _load_files(data_dir: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one PNG of images stacked from top to bottom, and its labels."""
    path = data_dir / (_TRAIN if train else _TEST)
    with np.load(data_dir / _LABELS) as arrays:
        labels = arrays["train8k_labels" if train else "test_labels"]
    with Image.open(path) as image:
        pixels = np.array(image)
    if pixels.shape != (32 * len(labels), 32, 3):
        raise ValueError(
            f"CIFAR10Data: {path.name} must be 32 pixels wide, in colour and {32 * len(labels)} pixels high (one image "
            f"per label), got an array of shape {pixels.shape}; replace it, or {_LABELS}, by the matching file."
        )
    return pixels.reshape(-1, 32, 32, 3), labels
