"""The analysis of a transformer with 7 billion parameters: the shapes of its layers, random weights, layer by layer.

    python benchmarks/analysis_large.py

Each distinct shape is analysed once in a fresh process, with the default method and every number of slices, at full
size and with both sides halved. What the whole model takes is computed from that: the sum over its layers. A block, and
two of the largest layers, are analysed as models of several layers, to see that the sum is right and that the peak of
the memory is that of one layer. Memory is measured as in ``analysis.py``, beyond the weights, which are there before.
Time is CPU seconds, of all threads together: what else runs on the machine adds to the time that passes, and little to
them. The pass of svdvals has one thread, for the same reason: threads of it that wait for each other do so in a loop.
"""

from __future__ import annotations

import argparse
import json
from math import log2
from time import process_time
from typing import Any

import torch
from analysis import fresh, peak_rise, warm_up
from environment import keep, markdown
from torch import nn

import lr_callback as lrc
from lr_callback.mathematics.folding import Geometry

BLOCKS = 32
LAYERS = {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)}
IN_A_BLOCK = {"q, k, v, o": 4, "gate, up": 2, "down": 1}
HEAD = {"head": (32000, 4096)}
EMBEDDING = 32000 * 4096  # parameters that are not analysed
LARGEST = "down"  # what takes the most memory of a block
Shape = tuple[int, int]


def model_of(shapes: list[Shape]) -> nn.Module:
    """Return a model of Linear layers ``(outputs, inputs)`` with seeded weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for outputs, inputs in shapes))


def analysed(shapes: list[Shape]) -> dict[str, Any]:
    """Analyse a model in a fresh process."""
    return fresh(__file__, "--shapes", json.dumps(shapes))


def print_analysed(shapes: list[Shape]) -> None:
    """Analyse a model in this process, and print the time and the memory; of one layer also the time of svdvals."""
    warm_up(lrc.ALDS())
    model = model_of(shapes)
    times: dict[str, float] = {}

    def run() -> None:
        start = process_time()
        lrc.analyze(model)
        times["cpu_seconds"] = process_time() - start

    rise = peak_rise(run)
    sizes = [4 * outputs * inputs / 2**20 for outputs, inputs in shapes]
    found = {"shapes": shapes, **times, "rise_mib": rise, "weights_mib": sum(sizes), "largest_layer_mib": max(sizes)}
    if len(shapes) == 1:
        torch.set_num_threads(1)
        start = process_time()
        torch.linalg.svdvals(next(model.parameters()).detach())
        found["svdvals_cpu_seconds"] = process_time() - start
    print(json.dumps(found))


def in_theory(shape: Shape) -> float:
    """Return the work of a layer as the package shares it out: products, and eigenvalues of every number of slices."""
    outputs, inputs = shape
    geometry = Geometry(outputs, inputs)
    return geometry.work(geometry.slice_counts())


def halved(shape: Shape) -> Shape:
    """Return both sides halved."""
    return shape[0] // 2, shape[1] // 2


def layer(name: str, shape: Shape, count: int) -> dict[str, Any]:
    """Measure a layer at both sizes; the exponents are those of a doubling of both sides."""
    full, half = analysed([shape]), analysed([halved(shape)])
    growth = {key: log2(full[key] / half[key]) for key in ("cpu_seconds", "svdvals_cpu_seconds", "rise_mib")}
    growth["work"] = log2(in_theory(shape) / in_theory(halved(shape)))
    print(name, full, growth, flush=True)
    return {"name": name, "shape": shape, "in_the_model": count, "full": full, "half": half, "growth": growth}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=json.loads)
    arguments = parser.parse_args()
    if arguments.shapes:
        print_analysed([tuple(shape) for shape in arguments.shapes])
        return
    counts = {**{name: BLOCKS * count for name, count in IN_A_BLOCK.items()}, "head": 1}
    rows = [layer(name, shape, counts[name]) for name, shape in {**LAYERS, **HEAD}.items()]
    block = [LAYERS[name] for name, count in IN_A_BLOCK.items() for _ in range(count)]
    several = {f"two of {LARGEST}": analysed([LAYERS[LARGEST]] * 2), "a block, 7 layers": analysed(block)}
    figures: dict[str, Any] = {"layers": rows, "several": several, "whole": _whole(rows)}
    title = "The analysis of a transformer with 7 billion parameters"
    keep("analysis_large", title, "python benchmarks/analysis_large.py", figures, _tables(figures))


def _whole(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Add the layers up to the model."""
    sums = {
        key: sum(row["in_the_model"] * row["full"][key] for row in rows)
        for key in ("cpu_seconds", "svdvals_cpu_seconds")
    }
    analysed_parameters = sum(row["in_the_model"] * row["shape"][0] * row["shape"][1] for row in rows)
    most = max(row["full"]["rise_mib"] for row in rows)
    return {**sums, "rise_mib": most, "analysed": analysed_parameters, "parameters": analysed_parameters + EMBEDDING}


def _tables(figures: dict[str, Any]) -> str:
    rows, whole = figures["layers"], figures["whole"]
    parts = [
        "One layer of each shape (outputs x inputs), float32, random weights, default method, every number of slices; "
        "beside it one float32 pass of svdvals over the same matrix, with one thread:",
        markdown(
            ["layer", "shape", "in the model", "analysis, CPU s", "svdvals, CPU s", *MEMORY],
            [_layer_cells(row) for row in rows],
        ),
        f"The whole model, computed and not measured: the layers' times, times their number in {BLOCKS} blocks and a "
        f"head ({whole['analysed'] / 1e9:.2f} of {whole['parameters'] / 1e9:.2f} billion parameters; the embedding is "
        f"left alone), give {whole['cpu_seconds'] / 60:.0f} minutes of CPU time, against "
        f"{whole['svdvals_cpu_seconds'] / 60:.0f} for svdvals. Beyond the weights it takes {whole['rise_mib']:.0f} "
        "MiB: the most that any layer takes, since the layers are analysed one after the other. The Gram matrix in "
        "float64 and LAPACK's copy of it are four times a float32 layer where that is square, and less elsewhere.",
        "Layers one after the other in one model, measured; last what the single layers above give:",
        markdown(["model", "weights, MiB", *MEMORY, "CPU s", "sum of layers, CPU s"], _several_cells(figures)),
        "Exponents of a doubling of both sides: log2 of full size to half size. In theory the time grows with the work "
        "of the products and the eigenvalues, and the memory with the layer, so with 2:",
        markdown(
            ["layer", "half size", "analysis, CPU", "work in theory", "svdvals, CPU", "memory"],
            map(_growth_cells, rows),
        ),
    ]
    return "\n\n".join(parts)


MEMORY = ("largest layer, MiB", "rise, MiB", "times")


def _memory_cells(found: dict[str, Any]) -> list[str]:
    largest, rise = found["largest_layer_mib"], found["rise_mib"]
    return [f"{largest:.0f}", f"{rise:.0f}", f"{rise / largest:.1f}x"]


def _layer_cells(row: dict[str, Any]) -> list[str]:
    full = row["full"]
    times = [f"{full[key]:.1f}" for key in ("cpu_seconds", "svdvals_cpu_seconds")]
    return [row["name"], _size(row["shape"]), str(row["in_the_model"]), *times, *_memory_cells(full)]


def _several_cells(figures: dict[str, Any]) -> list[list[str]]:
    alone = {tuple(row["shape"]): row["full"]["cpu_seconds"] for row in figures["layers"]}
    cells = []
    for name, found in figures["several"].items():
        computed = sum(alone[tuple(shape)] for shape in found["shapes"])
        measured = [f"{found['weights_mib']:.0f}", *_memory_cells(found), f"{found['cpu_seconds']:.1f}"]
        cells.append([name, *measured, f"{computed:.1f}"])
    return cells


def _growth_cells(row: dict[str, Any]) -> list[str]:
    growth = row["growth"]
    exponents = [f"{growth[key]:.2f}" for key in ("cpu_seconds", "work", "svdvals_cpu_seconds", "rise_mib")]
    return [row["name"], _size(halved(row["shape"])), *exponents]


def _size(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


if __name__ == "__main__":
    main()
