"""Time of the analysis on one process and shared out over two, one thread each.

    python benchmarks/distributed.py

Two processes run for the whole measurement. In each round the first analyses all layers by itself, the other waits;
then both share them out; what is kept is the median over the rounds of the ratio within a round, of the time and of the
processor's time of the busier process, which other programs on the machine change less. The ratio that the shares allow
is that of the estimated work of all layers to that of the process with the most, where a layer is never split.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed
import torchvision
from environment import keep, markdown
from torch import nn

from lr_callback.analysis.analyze import analyze
from lr_callback.common.processes import Processes
from lr_callback.decisions.analysed import Analysis
from lr_callback.layers.layer_types import layer_cost
from lr_callback.model.find import find_layers

NETWORKS = ("resnet18", "resnet50")
CLOCKS = ("seconds", "processor_seconds")


def network(name: str) -> nn.Module:
    """Return a torchvision network with seeded weights."""
    torch.manual_seed(0)
    made: nn.Module = getattr(torchvision.models, name)(weights=None)
    return made


def seconds(processes: Processes, run: Callable[[], object]) -> tuple[float, float]:
    """Return the time of one run that all processes begin together, and the processor's time of the busiest."""
    torch.distributed.barrier()
    start, busy = perf_counter(), process_time()
    run()
    passed, busy = perf_counter() - start, process_time() - busy
    return passed, max(processes.gather(lambda: busy))


def measure(rank: int, size: int, rounds: int, folder: str) -> None:
    """Take part in the measurement; the first process writes it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    found = [_network(name, Processes(rank, size), rounds) for name in NETWORKS]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _network(name: str, processes: Processes, rounds: int) -> dict[str, Any]:
    model, rounds_of = network(name), []
    for _ in range(rounds + 1):
        alone = seconds(processes, lambda: analyze(model) if processes.rank == 0 else None)
        shared = seconds(processes, lambda: analyze(model, processes=processes))
        rounds_of.append((alone, shared))
    counted = rounds_of[1:]  # the first round warms up
    return {
        "network": name,
        **{key: _quotients([(alone[at], shared[at]) for alone, shared in counted]) for at, key in enumerate(CLOCKS)},
        "allowed": round(allowed(model, processes.size), 2),
        "equal": equal(analyze(model), analyze(model, processes=processes)),
    }


def _quotients(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    ratios = [alone / shared for alone, shared in pairs]
    return {
        "alone": round(median(alone for alone, _ in pairs), 3),
        "shared": round(median(shared for _, shared in pairs), 3),
        "ratio": round(median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }


def allowed(model: nn.Module, size: int) -> float:
    """Return the work of all layers as a multiple of that of the process with the most."""
    work = [_work(layer) for layer in find_layers(model).layers.values()]
    owners = Processes(0, size).owners(work)
    return sum(work) / max(
        sum(one for one, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(size)
    )


def _work(layer: nn.Module) -> float:
    geometry = layer_cost(layer).geometry
    return geometry.work(geometry.slice_counts())


def equal(one: Analysis, other: Analysis) -> bool:
    """Return whether two analyses are the same, bit for bit."""

    def plain(analysis: Analysis) -> Mapping[str, object]:
        return {
            name: [
                (candidate.folding, candidate.num_slices, candidate.errors.tolist()) for candidate in layer.candidates
            ]
            for name, layer in analysis.layers.items()
        }

    return plain(one) == plain(other)


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        settings = (arguments.processes, arguments.rounds, folder)
        ranks = [context.Process(target=measure, args=(rank, *settings)) for rank in range(arguments.processes)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    figures = {"processes": arguments.processes, "networks": found}
    keep(
        "distributed",
        "The analysis shared out over processes",
        "python benchmarks/distributed.py",
        figures,
        _table(figures),
    )


def _table(figures: dict[str, Any]) -> str:
    rows = [
        [one["network"], *map(_cell, map(one.get, CLOCKS)), f"{one['allowed']}x", one["equal"]]
        for one in figures["networks"]
    ]
    header = ["network", "seconds", "processor's seconds of the busiest", "the shares allow", "same bits"]
    text = f"All candidates of all layers, one thread each: one process -> {figures['processes']} processes"
    return f"{text}:\n\n{markdown(header, rows)}"


def _cell(times: dict[str, float]) -> str:
    return f"{times['alone']} -> {times['shared']}, {times['ratio']}x ({times['least']} to {times['most']})"


if __name__ == "__main__":
    main()
