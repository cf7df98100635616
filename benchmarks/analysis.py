"""Speed and memory of the analysis: all candidates of all layers, against one pass of svdvals over the same matrices.

    python benchmarks/analysis.py

The passes of a round follow each other, so that a busy machine slows all of them; what is kept is the median over the
rounds of the ratio within a round. Memory is the most that a fresh process holds during the analysis beyond what it
held before, sampled every millisecond; the C library is told to return freed blocks at once, for what is counted to be
what is in use. The error of activations is measured on random images, whose forward passes are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from math import log2
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torchvision
from environment import keep, markdown
from torch import nn

import lr_callback as lrc

ERRORS = ("slice", "operator")
ACTIVATION = "activation"
IMAGES = (4, 32)  # batches, and images in one: as many positions as the widest layer has inputs
NETWORKS = ("resnet18", "resnet50")
WIDTHS = (64, 128, 256, 512)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def network(name: str) -> nn.Module:
    """Return a torchvision network with seeded weights, or ``convN``: one 3x3 convolution of width N."""
    torch.manual_seed(0)
    if name.startswith("conv"):
        width = int(name.removeprefix("conv"))
        return nn.Sequential(nn.Conv2d(width, width, 3, bias=False))
    made: nn.Module = getattr(torchvision.models, name)(weights=None)
    return made


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """Return the folded weights, float32, one slice."""
    layers = (layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    return [layer.weight.detach().flatten(1) for layer in layers]


def moments(name: str, model: nn.Module) -> dict[str, lrc.Importance]:
    """Return the second moments of a network's inputs, for random images."""
    batches, count = IMAGES
    shape = (*model[0].weight.shape[1:2], 16, 16) if name.startswith("conv") else (3, 224, 224)
    return dict(lrc.collect_moments(model.eval(), [torch.randn(count, *shape) for _ in range(batches)]))


def seconds(run: Callable[[], object]) -> float:
    """Return the time of a run: the mean of as many as take a fifth of a second."""
    start, runs = perf_counter(), 0
    while runs == 0 or perf_counter() - start < 0.2:
        run()
        runs += 1
    return (perf_counter() - start) / runs


def ratios(name: str, rounds: int) -> dict[str, Any]:
    """Time svdvals and each analysis in turn."""
    model = network(name)
    folded, importance = matrices(model), moments(name, model)
    runs: dict[str, Callable[[], object]] = {
        "svdvals": lambda: [torch.linalg.svdvals(matrix) for matrix in folded],
        **{error: partial(lrc.analyze, model, lrc.ALDS(error)) for error in ERRORS},
        ACTIVATION: partial(lrc.analyze, model, lrc.ALDS(ACTIVATION), importance=importance),
    }
    times = [{key: seconds(run) for key, run in runs.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    kept = {key: [one[key] for one in times] for key in runs}
    ratio = {error: quotients(kept[error], kept["svdvals"]) for error in ERRORS}
    ratio[ACTIVATION] = quotients(kept[ACTIVATION], kept["slice"])
    return {"network": name, "seconds": {key: median(values) for key, values in kept.items()}, "ratio": ratio}


def quotients(values: list[float], base: list[float]) -> dict[str, float]:
    """Return the median, the least and the most of the ratios within a round."""
    each = [value / other for value, other in zip(values, base, strict=True)]
    return {"median": round(median(each), 2), "least": round(min(each), 2), "most": round(max(each), 2)}


def budget_seconds(name: str) -> float:
    """Return the longest time of an allocation after the analysis."""
    analysis = lrc.analyze(network(name))
    reachable = [ratio for ratio in RATIOS if ratio >= analysis.reachable[0]]
    return max(seconds(lambda ratio=ratio: analysis.allocate(ratio)) for ratio in reachable)


def memory(name: str, error: str) -> dict[str, float]:
    """Return the rise of the peak memory in a fresh process, in MiB and as a multiple of the largest layer."""
    return fresh(__file__, "--memory-of", name, error)


def fresh(file: str, *arguments: str) -> dict[str, float]:
    """Run a program in a fresh process, which returns freed memory at once, and read the JSON that it prints."""
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, file, *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    result: dict[str, float] = json.loads(printed)
    return result


def print_memory(name: str, error: str) -> None:
    """Analyse in this process, and print what it took."""
    method = lrc.ALDS(error=error)
    warm_up(method)
    model = network(name)
    largest = max(matrix.numel() * matrix.element_size() for matrix in matrices(model)) / 2**20
    rise = peak_rise(lambda: lrc.analyze(model, method))
    print(json.dumps({"largest_layer_mib": round(largest, 1), "rise_mib": round(rise, 1), "times": rise / largest}))


def warm_up(method: lrc.Method) -> None:
    """Analyse a small layer, which loads the libraries' own buffers."""
    lrc.analyze(nn.Sequential(nn.Conv2d(128, 256, 3)), method)


def peak_rise(run: Callable[[], object]) -> float:
    """Return the most that this process holds during a run beyond what it held before, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is taken now
    before, samples, done = held(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(held())

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(0.0, max(samples) - before)


def held() -> float:
    """Return the memory that this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "ERROR"))
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(*arguments.memory_of)
        return
    figures: dict[str, Any] = {
        "networks": [ratios(name, arguments.rounds) for name in NETWORKS],
        "budget_seconds": {name: round(budget_seconds(name), 4) for name in NETWORKS},
        "widths": [ratios(f"conv{width}", arguments.rounds) for width in WIDTHS],
        "memory": {f"{name}, {error}": memory(name, error) for name in (*NETWORKS, "conv1024") for error in ERRORS},
    }
    figures["growth"] = {key: _growth(figures["widths"], key) for key in ("svdvals", *ERRORS)}
    keep("analysis", "Speed and memory of the analysis", "python benchmarks/analysis.py", figures, _tables(figures))


def _growth(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Return the exponent of each doubling of the width: log2 of the quotient of the times."""
    times = [row["seconds"][key] for row in rows]
    return [round(log2(after / before), 2) for before, after in itertools.pairwise(times)]


def _tables(figures: dict[str, Any]) -> str:
    networks = [*figures["networks"], *figures["widths"]]
    memory_rows = [
        [name, one["largest_layer_mib"], one["rise_mib"], f"{one['times']:.1f}x"]
        for name, one in figures["memory"].items()
    ]
    growth = [[key, *exponents] for key, exponents in figures["growth"].items()]
    doublings = [f"{before} to {after}" for before, after in itertools.pairwise(WIDTHS)]
    budgets = ", ".join(f"{name} {value} s" for name, value in figures["budget_seconds"].items())
    parts = [
        "All candidates (every number of slices, default folding) against one float32 pass of svdvals (one slice):",
        markdown(["network", "svdvals, s", *(f"error={error}" for error in ERRORS)], map(_speed_row, networks)),
        "The same with the error of activations, against error=slice (without the passes that collect the moments):",
        markdown(["network", f"error={ACTIVATION}"], [[row["network"], _cell(row, ACTIVATION)] for row in networks]),
        f"Any budget after that, at most: {budgets}.",
        "Exponent of the time for each doubling of the width of a 3x3 convolution:",
        markdown(["", *doublings], growth),
        "Rise of the peak memory:",
        markdown(["analysis", "largest layer, MiB", "rise, MiB", "times"], memory_rows),
    ]
    return "\n\n".join(parts)


def _speed_row(row: dict[str, Any]) -> list[str]:
    return [row["network"], f"{row['seconds']['svdvals']:.3f}", *(_cell(row, error) for error in ERRORS)]


def _cell(row: dict[str, Any], error: str) -> str:
    ratio = row["ratio"][error]
    return f"{row['seconds'][error]:.3f} s, {ratio['median']}x ({ratio['least']} to {ratio['most']})"


if __name__ == "__main__":
    main()
