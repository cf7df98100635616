"""Images kept as one uint8 tensor, cut into batches and augmented with tensor operations.

Both data sets fit in memory, and a batch is gathered, shifted, mirrored and scaled in a few calls; one call per image,
as torchvision's transforms need, is ten times slower and would call for worker processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class ImageTensors(Dataset[Batch]):
    """Serve scaled images and labels from tensors, a whole batch at a time.

    Args:
        images: uint8, ``(count, channels, height, width)``.
        labels: int64, ``(count,)``.
        white: The value that stands for 1.0: 255 for 8-bit images.
        mean: Per channel, subtracted after the division by ``white``.
        std: Per channel, divided by last.
        shift: Each image moves by at most this many pixels in either direction, black coming in; 0 for none.
        mirror: Mirror each image left to right with probability 1/2.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        white: int,
        mean: Sequence[float],
        std: Sequence[float],
        shift: int = 0,
        mirror: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.white = white
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.shift = shift
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return images ``(batch, channels, height, width)`` as float32 and labels ``(batch,)``."""
        images = self.images[indices]
        if self.shift or self.mirror:
            images = shift_and_mirror(images, self.shift, self.mirror)
        return (images / self.white - self.mean) / self.std, self.labels[indices]


def shift_and_mirror(images: Tensor, shift: int, mirror: bool) -> Tensor:
    """Move each image by its own random offset and mirror each with probability 1/2, if asked to.

    Args:
        images: ``(batch, channels, height, width)``, any dtype.
        shift: Greatest move in pixels, each of the ``(2 * shift + 1) ** 2`` offsets being equally likely.
        mirror: Whether to mirror left to right.

    Returns:
        A new tensor of the same shape and dtype; zeros where nothing moved in.
    """
    batch, channels, height, width = images.shape
    top_left = torch.randint(2 * shift + 1, (2, batch, 1))
    rows = top_left[0] + torch.arange(height)
    columns = top_left[1] + torch.arange(width)
    if mirror:
        columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (shift, shift, shift, shift))
    which = torch.arange(batch).view(-1, 1, 1, 1)
    return padded[which, torch.arange(channels).view(-1, 1, 1), rows[:, None, :, None], columns[:, None, None, :]]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Shuffle so that every prefix holds the classes in proportion, give or take one image of each.

    Args:
        labels: int64, ``(count,)``.
        seed: The same seed gives the same order, whatever the global random state.

    Returns:
        A permutation of ``range(count)``.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    quantile = torch.empty(len(labels))
    for label in sorted(set(labels.tolist())):
        members = labels[shuffled] == label
        count = int(members.sum())
        quantile[members] = (torch.arange(count) + 0.5) / count
    return shuffled[quantile.argsort(stable=True)]


def batches(data: ImageTensors, batch_size: int, num_workers: int, shuffle: bool = False) -> DataLoader[Batch]:
    """Return a loader that asks ``data`` for whole batches."""
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=_keep,
        persistent_workers=num_workers > 0,
    )


def _keep(batch: object) -> object:
    # A named function, not a lambda: worker processes started by "spawn" must pickle it.
    return batch
