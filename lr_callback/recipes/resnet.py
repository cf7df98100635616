"""The residual networks for 32 x 32 images of He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut of type A, which has no parameters."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.new_planes = planes - in_planes

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_planes == 0:
            return x
        before = self.new_planes // 2
        every_second = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(every_second, (0, 0, 0, 0, before, self.new_planes - before))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self._shortcut(x))


class CifarResNet(nn.Module):
    """Build the CIFAR ResNet: one convolution, three stages of ``(depth - 2) / 6`` blocks, one linear layer.

    State-dict keys are ``conv1``, ``bn1``, ``layer{1,2,3}.N.{conv1,bn1,conv2,bn2}`` and ``linear``, so the networks
    of https://github.com/akamaster/pytorch_resnet_cifar10 load unchanged (once ``module.`` is off their keys).

    Args:
        depth: Number of layers with weights on the main path, ``6n + 2`` with ``n >= 1``: 8, 14, 20, 32, 44, 56, ...
        num_classes: Number of outputs.
        in_channels: Channels of the input image: 3 for colour, 1 for grey.
        width: Channels of the first stage; the second has twice and the third four times as many.
        weights: Path of a state dict saved with ``torch.save``, loaded strictly; ``None`` starts from random weights.

    Raises:
        ValueError: ``depth`` is not ``6n + 2``.
        FileNotFoundError: ``weights`` names no file.
        RuntimeError: The state dict in ``weights`` does not fit the network.

    Example::

        >>> import torch
        >>> from lr_callback.recipes import CifarResNet
        >>> network = CifarResNet(depth=20)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in network.parameters())
        269722
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        self._initialize()
        if weights is not None:
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores.

        Args:
            x: Images, ``(batch, in_channels, height, width)``; 32 x 32 in the paper, any size works.

        Returns:
            Scores before the softmax, ``(batch, num_classes)``.
        """
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        scores: Tensor = self.linear(out.mean(dim=(2, 3)))
        return scores


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """Stack ``blocks`` blocks; only the first changes the size."""
    first = _BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(_BasicBlock(planes, planes, stride=1) for _ in range(blocks - 1)))


def _blocks_per_stage(depth: int) -> int:
    """Solve ``depth = 6n + 2`` for ``n``."""
    if depth < 8 or depth % 6 != 2:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"CifarResNet: `depth` must be 6n + 2 with n >= 1, got {depth}; nearest: {nearest}.")
    return (depth - 2) // 6
