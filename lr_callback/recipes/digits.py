"""Scikit-learn's handwritten digits: real images that come with an installed package, so nothing is downloaded."""

import importlib
from types import ModuleType

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lr_callback.recipes._images import Batch, ImageTensors, batches, stratified_order

# Pixels run from 0 to 16; mean and standard deviation are those of all images after division by 16.
_WHITE = 16
_MEAN = (0.3053,)
_STD = (0.3760,)


class DigitsData(pl.LightningDataModule):
    """Serve the 1,797 grey images of 8 x 8 pixels as ``(1, 8, 8)``, with labels 0 to 9.

    The split into training, validation and test images is fixed by ``seed`` alone and holds each class in proportion.

    Args:
        batch_size: Images per batch.
        val_fraction: Share of all images held out for validation, above 0.
        test_fraction: Share of all images held out for the test, above 0; together with ``val_fraction`` below 1.
        seed: Chooses the split.
        num_workers: Worker processes per loader; 0 is fastest for data this small.
        augment: Shift each training image by at most one pixel.

    Raises:
        ValueError: A fraction is not above 0, or both together are not below 1.

    Example::

        >>> from lr_callback.recipes import DigitsData
        >>> data = DigitsData(batch_size=64)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape
        torch.Size([64, 1, 8, 8])
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__()
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                "DigitsData: `val_fraction` and `test_fraction` must be above 0 and together below 1, got "
                f"{val_fraction} and {test_fraction}; choose for example 0.1 and 0.2."
            )
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        """Load the images and split them; every stage needs the same few, so ``stage`` is not looked at.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        digits = _sklearn_datasets().load_digits()
        self._images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        self._labels = torch.from_numpy(digits.target).long()
        order = stratified_order(self._labels, self.seed)
        val = round(self.val_fraction * len(order))
        test = round(self.test_fraction * len(order))
        self.val_data = self._subset(order[:val])
        self.test_data = self._subset(order[val : val + test])
        self.train_data = self._subset(order[val + test :], shift=1 if self.augment else 0)

    def _subset(self, indices: torch.Tensor, shift: int = 0) -> ImageTensors:
        images, labels = self._images[indices], self._labels[indices]
        return ImageTensors(images, labels, white=_WHITE, mean=_MEAN, std=_STD, shift=shift)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the shuffled training batches."""
        return batches(self.train_data, self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return batches(self.val_data, self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches."""
        return batches(self.test_data, self.batch_size, self.num_workers)


def _sklearn_datasets() -> ModuleType:
    """Import what only this recipe needs when it is needed: scikit-learn is an optional extra."""
    try:
        return importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitsData: scikit-learn must be installed, and it was not found; "
            "install it with: pip install 'lr_callback[examples]'"
        ) from error
