"""The trained networks of the accuracy benchmarks: two CIFAR ResNets, and a plain one, trained here.

    python benchmarks/networks.py --data DIR --weights vgg.pt

trains the plain one: no shortcuts, convolutions with a bias, after VGG (Simonyan and Zisserman 2014). No choice of the
package was made on it.
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Trainer
from torch import nn
from torchvision.models.vgg import make_layers

from lr_callback.recipes import CIFAR10Data, CifarResNet, ImageClassifier

_WIDTHS: list[str | int] = [32, "M", 64, 64, "M", 128, 128, "M", 128]
_DEPTHS = {"resnet20": 20, "resnet56": 56}
NAMES = (*_DEPTHS, "vgg")
_EPOCHS = 30


def vgg() -> nn.Sequential:
    """Return the plain network, untrained: images ``(batch, 3, 32, 32)`` to ten scores."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(*make_layers(_WIDTHS, batch_norm=True), *head)


def trained(name: str, weights: str) -> nn.Module:
    """Return a fresh copy of a trained network, in eval mode.

    Args:
        name: one of :data:`NAMES`.
        weights: path of its state dict.
    """
    if name in _DEPTHS:
        return CifarResNet(depth=_DEPTHS[name], weights=weights).eval()
    network = vgg()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def main() -> None:
    """Train the plain network and keep its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10, as CIFAR10Data takes it")
    parser.add_argument("--weights", required=True, help="where its state dict goes")
    arguments = parser.parse_args()
    seed_everything(0, verbose=False)
    model = ImageClassifier(vgg(), weight_decay=5e-4, schedule="cosine", warmup_epochs=2, channels_last=True)
    data = CIFAR10Data(arguments.data, batch_size=128)
    trainer = Trainer(max_epochs=_EPOCHS, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    torch.save(model.network.state_dict(), arguments.weights)


if __name__ == "__main__":
    main()
