"""Accuracy of a trained CIFAR-10 network right after the cut, with what repair brings back, without training.

    python benchmarks/repair.py --data DIR --weights DIR/cifar10_resnet20.pt

Each row is one way to choose the ranks and one way to repair, evaluated on the 10,000 test images at each size.
Moments, effects and refits are measured on training images as the training loader gives them (padded by 4, cropped,
mirrored); no test image is used for them. The factors are multiplied back for the evaluation: the function is the same,
and dense convolutions of this size are faster on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from accuracy import accuracy, command, compose, images, laid_out, parser
from environment import keep, markdown
from networks import trained
from torch import Tensor, nn

import lr_callback as lrc

WAYS: Mapping[str, lrc.Method] = {
    "slice, minimax": lrc.ALDS(),
    "slice, sum of squares": lrc.ALDS(objective="sum"),
    "activation, minimax": lrc.ALDS("activation"),
    "activation, sum of squares": lrc.ALDS("activation", "sum"),
    "activation, sum of fourth powers": lrc.ALDS("activation", "sum", power=4),
    "activation, loss, fourth powers": lrc.ALDS("activation", "loss", power=4),
    "the default: the same, moments shrunk": lrc.ALDS("activation", "loss", power=4, shrinkage=0.5),
}
REPAIRS = ("none", "decoder, dense inputs", "both, dense inputs", "decoder, cut inputs", "both, cut inputs")
RATIOS = (0.8, 0.7, 0.5, 0.35, 0.25, 0.2)
CALIBRATION = {"batch_size": 256, "batches": 8, "effects_batches": 2, "seed": 0}

Result = TypeVar("Result")
Batches = list[tuple[Tensor, Tensor]]


class Study:
    """What is measured once of a network: its dense accuracy, its moments and effects, and the analyses.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.data = images(arguments.data, CALIBRATION["batch_size"])
        torch.manual_seed(CALIBRATION["seed"])
        batches = islice(self.data.train_dataloader(), CALIBRATION["batches"])
        self.batches: Batches = [(laid_out(images), labels) for images, labels in batches]
        self.seconds: dict[str, float] = {}
        self.moments = self.timed("moments", lambda: lrc.collect_moments(self.network(), self.batches))

    def network(self) -> nn.Module:
        """Return a fresh copy of the trained network."""
        return trained(self.arguments.network, self.arguments.weights)

    def timed(self, name: str, run: Callable[[], Result]) -> Result:
        """Run something and note how long it took."""
        start = time.perf_counter()
        result = run()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return result

    def importance(self, method: lrc.Method) -> dict[str, lrc.Importance] | None:
        """Return what a method's errors are weighted by."""
        if method.error != "activation":
            return None
        if getattr(method, "objective", None) != "loss":
            return dict(self.moments)
        batches = self.batches[: CALIBRATION["effects_batches"]]
        return lrc.measure_effects(self.network(), batches, method=method, importance=self.moments)

    def row(self, way: str, repair: str, ratios: tuple[float, ...]) -> dict[str, Any]:
        """Cut, repair and evaluate a network at each size."""
        method = WAYS[way]
        importance = self.timed(f"importance, {way}", lambda: self.importance(method))
        analysis = lrc.analyze(self.network(), method, importance=importance)
        row: dict[str, Any] = {"way": way, "repair": repair, "top1": {}, "seconds": {}, "kept": {}}
        for ratio in ratios:
            model, allocation = self.network(), analysis.allocate(ratio)
            report = lrc.factorize_(model, allocation, importance=importance)
            start = time.perf_counter()
            if repair != "none":
                factors, _, inputs = repair.removesuffix(" inputs").partition(", ")
                gentle = way.startswith("the default")  # as refit="auto" is
                lrc.refit_(model, report.replaced, self.batches, inputs=inputs, factors=factors, gentle=gentle)
            row["seconds"][ratio] = round(time.perf_counter() - start, 1)
            row["kept"][ratio] = round(allocation.cost / allocation.dense_cost, 4)
            compose(model, self.data)
            row["top1"][ratio] = accuracy(model, self.data.test_dataloader())
            print(way, "|", repair, "|", ratio, row["top1"][ratio], row["seconds"][ratio], flush=True)
        return row


def main() -> None:
    """Measure every way and repair, and keep the table."""
    options = parser(__doc__)
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--repairs", nargs="+", default=["none", "both, cut inputs"], choices=list(REPAIRS))
    options.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    arguments = options.parse_args()
    study, ratios = Study(arguments), tuple(arguments.ratios)
    dense = accuracy(study.network(), study.data.test_dataloader())
    rows = [study.row(way, repair, ratios) for way in arguments.ways for repair in arguments.repairs]
    table = markdown(
        ["ranks by", "repair", *(f"keep {ratio}" for ratio in ratios)],
        [[row["way"], row["repair"], *(f"{row['top1'][ratio]:.1f}" for ratio in ratios)] for row in rows],
    )
    keep(
        f"{arguments.network}_repair",
        f"CIFAR-10 {arguments.network} right after the cut, repaired",
        command("repair", arguments.network),
        {"calibration": CALIBRATION, "dense": dense, "seconds": study.seconds, "rows": rows},
        f"Top-1 in percent on the 10,000 test images. Dense: {dense}.\n\n{table}",
    )


if __name__ == "__main__":
    main()
