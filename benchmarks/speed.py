"""How much of a reduction of multiply-adds becomes time, and how well times are predicted.

    python benchmarks/speed.py [--networks resnet18 resnet50 vgg16 vit_base_patch16_224] [--counted-only]

Networks have seeded random weights: time does not depend on them. Batches of 32 images on two threads, in eval mode,
without gradients; convolutional networks have their channels last in memory, dense and factorized alike. All networks
of a kind take turns; the time of each is divided into that of the dense network in the same round, run in the same way,
and what is kept is the median over the rounds. ``compiled`` is ``torch.compile`` with inductor's freezing, which folds
BatchNorm into the convolutions and appends activations to them; ``folded`` are BatchNorms folded by
``torch.fx.experimental.optimization.fuse``, ``pointwise`` is the network after ``lrc.pointwise_``. The last column
compares with the dense network as it is, neither folded, nor compiled, nor pointwise; rows of earlier runs may lack it.

First the ranks are chosen under a budget in multiply-adds, one slice, multiples of 16 (a block of this processor); then
under one in time, ``cost="latency"``, for which the share of the dense time that was predicted stands beside the one
that was measured. ``at best`` is what the first could be if the time of the layers fell as their multiply-adds do and
the rest, which no factorization changes, stayed: the share of the rest is that of the eager run. ViT is timm's, whose
attention is made of Linear layers.

glibc gives large blocks back to the system when they are freed, or does not, by what else the process has freed before:
the same network then takes more or less time from one moment to the next. The program starts itself with the settings
that let it keep them, which ``docs/SPEED.md`` recommends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import timm
import torch
import torchvision
from environment import RESULTS, keep, markdown
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze
from lr_callback.decisions.analysed import Analysis
from lr_callback.model.observe import Observation, observe
from lr_callback.model.pricing import Prices
from lr_callback.units.latency import Stopwatch

NETWORKS = ("resnet18", "resnet50", "vgg16", "vit_base_patch16_224")
RATIOS = (0.5, 0.3, 0.2)
BATCH, THREADS, SEED = 32, 2, 0

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment in which glibc keeps what is freed."""

Row = dict[str, Any]


def subject(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, and a batch of images, in the memory format that is fastest for it."""
    torch.manual_seed(SEED)
    images = torch.randn(BATCH, 3, 224, 224)
    if name.startswith("vit"):
        made: nn.Module = timm.create_model(name, pretrained=False)
        return made.eval(), images
    made = getattr(torchvision.models, name)(weights=None)
    last = torch.channels_last
    return made.eval().to(memory_format=last), images.contiguous(memory_format=last)


def smaller(model: nn.Module, found: Analysis, seen: Observation) -> dict[float, tuple[nn.Module, Row]]:
    """Return the network at each ratio that can be reached, and what is known of it beforehand."""
    made: dict[float, tuple[nn.Module, Row]] = {}
    for ratio in RATIOS:
        try:
            allocation = found.allocate(ratio)
        except ValueError:
            continue
        cut = deepcopy(model)
        lrc.factorize_(cut, allocation)
        kept = seen.multiply_adds(cut) / seen.dense_multiply_adds
        made[ratio] = cut, {"kept": kept, "predicted": allocation.cost / allocation.dense_cost}
    return made


def compiled(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a network compiled for inference."""
    torch.compiler.reset()
    made: nn.Module = torch.compile(deepcopy(model))
    made(images)
    return made


def folded(model: nn.Module) -> nn.Module:
    """Return a copy whose BatchNorms are folded into the convolutions before them."""
    made: nn.Module = fuse(model)
    return made


def pointwise(model: nn.Module) -> nn.Module:
    """Return a copy whose Linear layers are convolutions of one pixel."""
    made = deepcopy(model)
    lrc.pointwise_(made)
    return made


def in_turns(networks: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each network in each round."""
    watches = {name: Stopwatch(lambda model=model: model(images), images.device) for name, model in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, watch in watches.items():
            times[name].append(watch.block() / 1e6)
    return times


def ways(model: nn.Module, images: Tensor) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return in what ways a network is run: name -> what makes it ready."""
    compile_it = partial(compiled, images=images)
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"eager": lambda one: one}
    if any(isinstance(one, nn.BatchNorm2d) for one in model.modules()):
        found["eager, folded"] = folded
    if isinstance(model, timm.models.VisionTransformer):  # the others have Linear layers at their end alone
        found |= {"eager, pointwise": pointwise, "compiled, pointwise": lambda one: compile_it(pointwise(one))}
    return {**found, "compiled": compile_it}


def rows(name: str, rounds: int, counted_only: bool = False) -> list[Row]:
    """Measure a network in all ways, or in those with a budget in multiply-adds only."""
    model, images = subject(name)
    with torch.no_grad():
        counted = lrc.ALDS(max_slices=1, rank_multiple=16)
        seen = observe(model, images)
        cuts = smaller(model, analyze(model, counted, prices=Prices("multiply_adds", seen)), seen)
        found = []
        for way, prepare in ways(model, images).items():
            found += measured(name, way, model, cuts, images, rounds, prepare)
        if counted_only:
            return found
        start = perf_counter()
        timed = observe(model, images, lrc.ALDS(max_slices=1))
        seconds = perf_counter() - start
        cuts = smaller(model, analyze(model, lrc.ALDS(max_slices=1), prices=Prices("latency", timed)), seen)
        found += measured(name, "latency", model, cuts, images, rounds)
        assert timed.latencies is not None
        facts = {"seconds": seconds, "rest": timed.latencies.rest / timed.latencies.dense}
        return [{**row, **facts} for row in found]


def measured(
    name: str,
    way: str,
    model: nn.Module,
    cuts: Mapping[float, tuple[nn.Module, Row]],
    images: Tensor,
    rounds: int,
    prepare: Callable[[nn.Module], nn.Module] = lambda one: one,
) -> list[Row]:
    """Return a row for each smaller network, against the dense one run alike and the dense one as it is."""
    networks = {
        "as it is": model,
        "dense": prepare(model),
        **{str(one): prepare(cut) for one, (cut, _) in cuts.items()},
    }
    times = in_turns(networks, images, rounds)

    def ratio(one: str, other: str) -> float:
        return median(above / below for above, below in zip(times[one], times[other], strict=True))

    found = []
    for asked, (_, facts) in cuts.items():
        own = str(asked)
        each = {"dense_ms": median(times["dense"]), "ms": median(times[own]), "speed_up": ratio("dense", own)}
        found.append({"network": name, "way": way, "ratio": asked, **facts, **each, "in_all": ratio("as it is", own)})
    return found


def _at_best(row: Row) -> str:
    """Return what is known of the limit of a row."""
    if row["way"] != "eager" or "rest" not in row:
        return ""
    return f"{row['kept'] / (row['rest'] + (1 - row['rest']) * row['kept']):.2f}"


def tables(found: Sequence[Row]) -> str:
    """Return both tables."""
    counted = [
        [
            row["network"],
            row["way"],
            f"{row['kept']:.3f}",
            f"{row['dense_ms']:,.0f}",
            f"{row['ms']:,.0f}",
            f"{row['speed_up']:.2f}",
            f"{row['speed_up'] * row['kept']:.2f}",
            _at_best(row),
            f"{row['in_all']:.2f}" if "in_all" in row else "",
        ]
        for row in found
        if row["way"] != "latency"
    ]
    timed = [
        [
            row["network"],
            f"{row['ratio']:.2f}",
            f"{row['predicted']:.3f}",
            f"{1 / row['speed_up']:.3f}",
            f"{row['predicted'] * row['speed_up'] - 1:+.1%}",
            f"{row['kept']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in found
        if row["way"] == "latency"
    ]
    first = ["network", "run", "multiply-adds kept", "dense, ms", "ms", "speed-up", "speed-up / reduction"]
    first += ["at best", "against dense, eager"]
    second = ["network", "time asked", "predicted", "measured", "off", "multiply-adds kept", "measuring, s"]
    return (
        f"Budget in multiply-adds, one slice, ranks in multiples of 16:\n\n{markdown(first, counted)}\n\n"
        f"Budget in time, one slice, as shares of the dense time:\n\n{markdown(second, timed)}"
    )


def main() -> None:
    """Measure the networks that are asked for; those of an earlier run are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counted-only", action="store_true", help="leave out the budget in time")
    chosen = parser.parse_args()
    if not KEEP.items() <= os.environ.items():
        with TemporaryDirectory() as empty:  # what was measured before is measured again
            environment = {**os.environ, **KEEP, "LR_CALLBACK_CACHE": empty}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    torch.set_num_threads(THREADS)
    torch._inductor.config.freezing = True
    file = RESULTS / "speed.json"
    known = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    for name in chosen.networks:
        new = rows(name, chosen.rounds, chosen.counted_only)
        known = [row for row in known if row["network"] != name] + new
        known.sort(key=lambda row: NETWORKS.index(row["network"]))
        keep("speed", "Time and multiply-adds", "python benchmarks/speed.py", {"rows": known}, tables(known))


if __name__ == "__main__":
    main()
