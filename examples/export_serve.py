"""From a compressed network to a file that is served without torch: export to ONNX, and run it in onnxruntime.

    python examples/export_serve.py

It prints the size of the file against that of the dense network, the accuracy that is served, and how many answers are
those of the model. It needs ``pip install -e '.[export,examples]'`` (scikit-learn for its images), and less than half a
minute of one CPU core.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam

import lr_callback as lrc


def network() -> nn.Sequential:
    """Return a small network for grey images of 8 x 8 pixels."""
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train for some epochs, with an optimizer of its own."""
    optimizer = Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


class Server:
    """Answers requests of any number of images; it knows the file, and nothing of torch or of the model."""

    def __init__(self, file: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(file))
        [self.input] = [one.name for one in self.session.get_inputs()]

    def answer(self, images: np.ndarray) -> np.ndarray:
        """Return the digit in each image."""
        [scores] = self.session.run(None, {self.input: images})
        return scores.argmax(axis=1)


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    train_images, test_images = images[360:], images[:360]

    model = network()
    train(model, train_images, labels[360:], epochs=5)
    lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.1))
    train(model, train_images, labels[360:], epochs=5)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.onnx"
        print(lrc.export(model, file, example_input=test_images[:1]))
        server = Server(file)
        answers = np.concatenate([server.answer(rows.numpy()) for rows in test_images.split([1, 64, 295])])
    with torch.no_grad():
        expected = model.eval()(test_images).argmax(dim=1)
    print(f"served: accuracy {float((answers == labels[:360].numpy()).mean()):.3f}")
    print(f"same answers as the model: {int((answers == expected.numpy()).sum())} of {len(answers)}")


if __name__ == "__main__":
    main()
