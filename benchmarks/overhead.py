"""What the callback costs a training: ResNet20 on 8,000 CIFAR-10 images, in epochs without a cut and at a cut.

    python benchmarks/overhead.py --data DIR --weights DIR/cifar10_resnet20.pt

Trainers with and without the callback take turns, each for one epoch of the same batches; the callback waits for an
epoch that never comes. Kept are the median over the turns of the quotient of their times, and the time spent in the
callback's own hooks as a share of the epoch, which a busy machine disturbs less. The first epoch of a run stands
apart: in it the callback watches the first batch, and repeats its calls once to count multiply-adds.

The time of a cut is that of the callback's hook at the start of its epoch, as a share of the median epoch without the
callback: calibration where there is any, analysis, allocation, layers, refit, optimizer and log. Beside it stands what
is not in the ``compression/seconds`` that it logs, nearly all of it the runs that are timed on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

from environment import keep, markdown
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

import lr_callback as lrc
from lr_callback.recipes import CIFAR10Data, CifarResNet, ImageClassifier

NEVER = 1_000_000
RATIOS = (0.7, 0.5, 0.3)
WAYS: dict[str, dict[str, Any]] = {
    "ALDS(), no refit": {"method": lrc.ALDS(), "refit": None},
    "ALDS('operator'), no refit": {"method": lrc.ALDS(error="operator"), "refit": None},
    "ALDS(), refit": {"method": lrc.ALDS()},
    "default": {},
}


class Clock(Callback):
    """Time the epochs, and the hooks of another callback, which stands after it in the list.

    Args:
        watched: the callback whose hooks are timed; None: there is none.
    """

    def __init__(self, watched: Callback | None) -> None:
        self.epochs: list[float] = []
        self.inside: list[float] = []
        self.cuts: list[float] = []
        self.logged = 0.0
        for name in [name for name in vars(type(watched)) if name.startswith("on_")]:
            setattr(watched, name, self._timed(name, getattr(watched, name)))

    def _timed(self, name: str, hook: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            start = perf_counter()
            result = hook(*arguments)
            if self.inside:
                self.inside[-1] += perf_counter() - start
            if name == "on_train_epoch_start":
                self.cuts.append(perf_counter() - start)
            return result

        return run

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of an epoch."""
        self.inside.append(0.0)
        self._start = perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it, and note what a cut says that it took."""
        self.epochs.append(perf_counter() - self._start)
        self.logged = float(trainer.callback_metrics.get("compression/seconds", 0.0))


def fit(arguments: argparse.Namespace, callback: Callback | None, epochs: int, folder: str) -> Clock:
    """Train for some epochs, and return the times."""
    seed_everything(0, verbose=False)
    clock = Clock(callback)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder),
        callbacks=[clock, *([] if callback is None else [callback])],
        limit_train_batches=arguments.batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = ImageClassifier(CifarResNet(depth=20, weights=arguments.weights), learning_rate=0.01)
    # All but the few images that a loader must hold out: 8,000 train.
    trainer.fit(model, datamodule=CIFAR10Data(arguments.data, val_fraction=0.01))
    return clock


def looking_on(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Let runs with and without the callback take turns; the one that begins changes."""
    rows = []
    for turn in range(arguments.turns):
        pair: dict[bool, Clock] = {}
        for with_callback in (False, True) if turn % 2 else (True, False):
            callback = lrc.LowRankCompression(0.5, epochs=NEVER) if with_callback else None
            pair[with_callback] = fit(arguments, callback, 2, folder)
        rows.append({name: (pair[name].epochs, pair[name].inside) for name in pair})
    quotients = [[row[True][0][epoch] / row[False][0][epoch] for row in rows] for epoch in (0, 1)]
    shares = [[row[True][1][epoch] / row[True][0][epoch] for row in rows] for epoch in (0, 1)]
    return {
        "epoch_seconds": median(seconds for row in rows for seconds in row[False][0]),
        "quotient": {"first epoch": median(quotients[0]), "later epochs": median(quotients[1])},
        "quotients_of_later_epochs": [round(value, 4) for value in quotients[1]],
        "share_in_hooks": {"first epoch": median(shares[0]), "later epochs": median(shares[1])},
    }


def cuts(arguments: argparse.Namespace, epoch_seconds: float, folder: str) -> dict[str, Any]:
    """Return the time of a cut, in seconds and as a share of an epoch, for several sizes and ways."""
    rows = {}
    arguments = argparse.Namespace(**{**vars(arguments), "batches": 2})
    for way, options in WAYS.items():
        for keep_ratio in RATIOS:
            clock = fit(arguments, lrc.LowRankCompression(keep_ratio, 1, show_table=False, **options), 2, folder)
            seconds = max(clock.cuts)
            unlogged = seconds - clock.logged
            rows[f"{way}, {keep_ratio}"] = {
                "seconds": seconds,
                "share_of_epoch": seconds / epoch_seconds,
                "seconds_beside_the_logged": unlogged,
            }
    return rows


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--batches", type=int, default=1_000_000, help="batches of an epoch, at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "never reached" is what is asked for
        figures = looking_on(arguments, folder)
        figures["cuts"] = cuts(arguments, figures["epoch_seconds"], folder)
    looking = [
        [epoch, f"{100 * (figures['quotient'][epoch] - 1):+.2f} %", f"{100 * figures['share_in_hooks'][epoch]:.3f} %"]
        for epoch in figures["quotient"]
    ]
    cut = [
        [
            name,
            f"{one['seconds']:.3f}",
            f"{100 * one['share_of_epoch']:.1f} %",
            f"{one['seconds_beside_the_logged']:.3f}",
        ]
        for name, one in figures["cuts"].items()
    ]
    parts = [
        f"An epoch without the callback takes {figures['epoch_seconds']:.2f} s. With it, where it does not cut:",
        markdown(["", "epoch against one without", "of it in the callback's hooks"], looking),
        "A cut:",
        markdown(["way, keep_ratio", "seconds", "of an epoch", "seconds beside the logged ones"], cut),
    ]
    keep(
        "overhead",
        "What the callback costs a training",
        f"python benchmarks/overhead.py --turns {arguments.turns}",
        figures,
        "\n\n".join(parts),
    )


if __name__ == "__main__":
    main()
