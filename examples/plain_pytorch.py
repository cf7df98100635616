"""Low-rank compression without a Trainer: train, look, cut, fine-tune, save, and load into a fresh model.

    python examples/plain_pytorch.py

It prints the table of the layers, the accuracy of the dense network, right after the cut and after each repair, the
size of the file, and that the fresh model gives the same outputs. It needs scikit-learn
(``pip install -e '.[examples]'``) for its images, and less than half a minute of one CPU core.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc


def network() -> nn.Sequential:
    """Return a small network for grey images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[DataLoader[tuple[Tensor, ...]], Tensor, Tensor]:
    """Return training batches, and the images and labels of the test."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels))
    train, test = order[360:], order[:360]
    batches = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
    return batches, images[test], labels[test]


def train(model: nn.Module, optimizer: SGD, batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train for some epochs."""
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of right answers."""
    model.eval()
    return float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    batches, images, labels = digits()
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, batches, epochs=5)
    print(f"dense: accuracy {accuracy(model, images, labels):.3f}")

    allocation = lrc.allocate(model, keep_ratio=0.1)  # changes nothing
    print(allocation)

    lrc.factorize_(model, allocation, optimizers=optimizer)  # in place; the optimizer goes on with the factors
    print(f"right after the cut: accuracy {accuracy(model, images, labels):.3f}")
    lrc.recalibrate_batchnorm_(model, batches)
    print(f"BatchNorm measured anew: accuracy {accuracy(model, images, labels):.3f}")
    train(model, optimizer, batches, epochs=5)
    print(f"fine-tuned: accuracy {accuracy(model, images, labels):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.pt"
        torch.save(model.state_dict(), file)
        print(f"saved: {file.stat().st_size:,} bytes")
        fresh = network()  # dense, as the code makes it
        lrc.restore_(fresh, file)  # the structure comes from the file, then the weights
    model.eval()
    fresh.eval()
    print(f"restored: same outputs {torch.equal(model(images), fresh(images))}")


if __name__ == "__main__":
    main()
