"""Accuracy of a trained CIFAR-10 network right after the cut, without training, for each method and size.

    python benchmarks/accuracy.py --data DIR --weights DIR/cifar10_resnet20.pt

Each row is evaluated on the 10,000 test images as it is, and again with BatchNorm recalibrated on 2,048 training images
as the training loader gives them (padded by 4, cropped, mirrored; batches of 256). The factors are multiplied back
before that: the function is the same (checked on one batch), and dense convolutions of this size are faster on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from environment import keep, markdown
from networks import NAMES, trained
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lr_callback as lrc
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.model.observe import observe
from lr_callback.recipes import CIFAR10Data
from lr_callback.repair.recalibrate import recalibrate_batchnorm_

METHODS: dict[str, lrc.Method] = {
    "ALDS, slice": lrc.ALDS(error="slice"),
    "ALDS, slice, four foldings": lrc.ALDS(error="slice", foldings=tuple(FOLDINGS)),
    "ALDS, operator": lrc.ALDS(error="operator"),
    "ALDS, bound": lrc.ALDS(error="bound"),
    "ALDS, Frobenius": lrc.ALDS(error="frobenius"),
    "ALDS, slice, sum of squares": lrc.ALDS(error="slice", objective="sum"),
    "ALDS, Frobenius, sum of squares": lrc.ALDS(error="frobenius", objective="sum"),
    "ALDS-Simple": lrc.ALDSSimple(),
    "ALDS-Error": lrc.ALDSError(),
    "ALDS-K": lrc.ALDSK(),
    "L-Rank": lrc.LRank(),
    "SVD (UniformRank)": lrc.UniformRank(),
    "SVD-Error (SingularValueThreshold)": lrc.SingularValueThreshold(),
    "SVD-Energy (EnergyThreshold)": lrc.EnergyThreshold(),
}
RATIOS = (0.7, 0.5, 0.4, 0.3, 0.2)
RECALIBRATION = {"batch_size": 256, "batches": 8, "seed": 0}


def laid_out(images: Tensor) -> Tensor:
    """Return images with their channels last in memory: convolutions, grouped ones above all, are faster on a CPU."""
    return images.to(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy in percent."""
    metric = MulticlassAccuracy(10, average="micro")
    model.eval()
    for images, labels in batches:
        metric.update(model(laid_out(images)), labels)
    return round(100 * float(metric.compute()), 2)


def recalibrated(model: nn.Module, data: CIFAR10Data) -> nn.Module:
    """Recalibrate BatchNorm on the same augmented batches whatever the model."""
    torch.manual_seed(RECALIBRATION["seed"])
    recalibrate_batchnorm_(model, islice(data.train_dataloader(), RECALIBRATION["batches"]))
    return model


@torch.inference_mode()
def compose(model: nn.Module, data: CIFAR10Data) -> None:
    """Multiply the factors back, and check on one batch that the function is the same."""
    images, _ = next(iter(data.test_dataloader()))
    factorized = model(images)
    lrc.densify_(model)
    torch.testing.assert_close(model(images), factorized, rtol=1e-3, atol=1e-3)


def measure(name: str, keep_ratio: float, arguments: argparse.Namespace, data: CIFAR10Data) -> dict[str, Any]:
    """Cut a fresh copy of the network, and evaluate it twice."""
    model = trained(arguments.network, arguments.weights)
    example = torch.zeros(1, 3, 32, 32)
    dense = observe(model, example)
    row: dict[str, Any] = {"method": name, "keep_ratio": keep_ratio}
    if keep_ratio < 1:
        allocation = lrc.allocate(model, keep_ratio, method=METHODS[name])
        lrc.factorize_(model, allocation)
        row["multiply_adds_kept"] = round(dense.multiply_adds(model) / dense.dense_multiply_adds, 4)
        compose(model, data)
        row |= {"parameters": allocation.cost, "worst_error": allocation.worst_error, "measure": allocation.error}
        row["layers"] = {layer: [one.folding, one.num_slices, one.rank] for layer, one in allocation.factorized.items()}
    row["top1_right_after"] = accuracy(model, data.test_dataloader())
    row["top1_batchnorm_recalibrated"] = accuracy(recalibrated(model, data), data.test_dataloader())
    print({key: value for key, value in row.items() if key != "layers"}, flush=True)
    return row


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return what reads the command line of a benchmark on a trained network."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder of CIFAR-10, as CIFAR10Data takes it")
    made.add_argument("--weights", required=True, help="state dict of the trained network")
    made.add_argument("--network", choices=NAMES, default="resnet20")
    return made


def images(folder: str, batch_size: int) -> CIFAR10Data:
    """Return CIFAR-10, ready to be read."""
    data = CIFAR10Data(folder, batch_size=batch_size)
    data.prepare_data()
    data.setup()
    return data


def command(name: str, network: str) -> str:
    """Return the command line that measures a network again."""
    weights = "vgg.pt" if network == "vgg" else f"DIR/cifar10_{network}.pt"
    line = f"python benchmarks/{name}.py --data DIR --weights {weights}"
    return line + (f" --network {network}" if network != "resnet20" else "")


def main() -> None:
    """Measure every method at every size, and keep the table."""
    arguments = parser(__doc__).parse_args()
    data = images(arguments.data, RECALIBRATION["batch_size"])
    dense = measure("dense", 1.0, arguments, data)
    rows = [measure(name, ratio, arguments, data) for name in METHODS for ratio in RATIOS]
    cells = {(row["method"], row["keep_ratio"]): row for row in rows}
    table = markdown(
        ["method", *(f"keep {ratio}" for ratio in RATIOS)],
        [[name, *(_cell(cells[name, ratio]) for ratio in RATIOS)] for name in METHODS],
    )
    note = (
        "Top-1 in percent on the 10,000 test images, right after the cut / with BatchNorm recalibrated. "
        f"Dense: {dense['top1_right_after']} / {dense['top1_batchnorm_recalibrated']}.\n\n"
    )
    keep(
        f"{arguments.network}_accuracy",
        f"Accuracy of CIFAR-10 {arguments.network} right after the cut",
        command("accuracy", arguments.network),
        {"recalibration": RECALIBRATION, "dense": dense, "rows": rows},
        note + table,
    )


def _cell(row: dict[str, Any]) -> str:
    return f"{row['top1_right_after']:.1f} / {row['top1_batchnorm_recalibrated']:.1f}"


if __name__ == "__main__":
    main()
