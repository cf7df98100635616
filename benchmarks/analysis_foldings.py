"""Where the time of an analysis goes, and what four foldings cost: ResNet50, every number of slices.

    python benchmarks/analysis_foldings.py

A time is the least of some rounds: what else runs on the machine only adds to it, and to that of a pass of svdvals more
than to ours, since its threads wait for each other. CPU seconds with one thread are hardly touched by that, and are
given beside it. The profile is of one analysis with the default folding, the fastest of some, taken by
``torch.profiler`` on all threads: the seconds of the workers are added up, so that their sum is larger than the time
that passes. The matrix rates are measured in the same process, right after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import torch
from analysis import matrices, network, seconds
from environment import keep, markdown
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

import lr_callback as lrc
from lr_callback.decisions.costs import LayerCost
from lr_callback.mathematics.folding import FOLDINGS, Geometry, fold

NETWORK = "resnet50"
FOUR = tuple(name for name in FOLDINGS if name != "depth_in_decoder")
PARTS = {
    "eigenvalues of Gram matrices": "aten::_linalg_eigh",
    "Gram products": "aten::baddbmm_",
    "weights to float64": "aten::_to_copy",
}
SIDES = (512, 2048)  # of the matrices whose product gives the rate: as the layers', and as large as it takes
GIGA = 1e9


def folded(model: nn.Module) -> list[torch.Tensor]:
    """Return every weight in every folding that differs, float32, one slice: more matrices than layers."""
    found: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach()
            cost = LayerCost(Geometry(weight.shape[0], weight.shape[1], tuple(weight.shape[2:])))
            found += [fold(weight, name, 1)[0].contiguous() for name in cost.distinct_foldings(FOUR)]
    return found


def compare(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Time the passes of svdvals and the analyses in turn, with all threads, then with one."""
    own, every = matrices(model), folded(model)
    runs: dict[str, Callable[[], object]] = {
        "svdvals, default folding": lambda: [torch.linalg.svdvals(matrix) for matrix in own],
        "analysis, default folding": lambda: lrc.analyze(model),
        "svdvals, four foldings": lambda: [torch.linalg.svdvals(matrix) for matrix in every],
        "analysis, four foldings": lambda: lrc.analyze(model, lrc.ALDS(foldings=FOUR)),
    }
    times = [{key: seconds(run) for key, run in runs.items()} for _ in range(rounds)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [{key: cpu_seconds(run) for key, run in runs.items()} for _ in range(2)]
    torch.set_num_threads(threads)
    return {
        "matrices": {"default folding": len(own), "four foldings": len(every)},
        "threads": threads,
        "seconds": {key: min(one[key] for one in times) for key in runs},
        "cpu_seconds_one_thread": {key: min(one[key] for one in alone) for key in runs},
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds of a run."""
    start = process_time()
    run()
    return process_time() - start


def profiled(model: nn.Module) -> dict[str, Any]:
    """Profile one analysis: the seconds of its parts, added up over threads, and the multiply-adds of two of them."""
    found, passed = min((_profile(model) for _ in range(4)), key=lambda one: one[1])
    spent = {event.key: event.cpu_time_total / 1e6 for event in found.key_averages()}
    whole = sum(event.self_cpu_time_total for event in found.key_averages()) / 1e6
    parts = {name: spent[operation] for name, operation in PARTS.items()}
    parts["all other operations of torch"] = whole - sum(parts.values())
    work = {"Gram products": 0.0, "eigenvalues of Gram matrices": 0.0}
    for event in found.key_averages(group_by_input_shape=True):
        if event.key == PARTS["Gram products"]:
            _, (count, rows, inner), (_, _, columns) = event.input_shapes[:3]
            work["Gram products"] += event.count * count * rows * inner * columns
        if event.key == PARTS["eigenvalues of Gram matrices"]:
            count, side = event.input_shapes[0][:2]
            work["eigenvalues of Gram matrices"] += event.count * count * side**3 * 2 / 3
    return {"seconds": passed, "thread_seconds": parts, "multiply_adds": work}


def _profile(model: nn.Module) -> tuple[profile, float]:
    """Return the profile of one analysis, and the time that passed."""
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=config) as found:
        start = perf_counter()
        lrc.analyze(model)
        passed = perf_counter() - start
    return found, passed


def rate(dtype: torch.dtype, side: int) -> float:
    """Return the multiply-adds in a second of a product of square matrices, the best of five."""
    left, right = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    return side**3 / min(seconds(lambda: left @ right) for _ in range(5))


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = network(NETWORK)
    figures: dict[str, Any] = {"network": NETWORK, **compare(model, arguments.rounds), "profile": profiled(model)}
    dtypes = (torch.float64, torch.float32)
    figures["rate"] = {str(dtype): {str(side): rate(dtype, side) for side in SIDES} for dtype in dtypes}
    best = {name: max(rates.values()) for name, rates in figures["rate"].items()}
    products = figures["profile"]["multiply_adds"]["Gram products"]
    figures["limit_seconds"] = {name: products / value for name, value in best.items()}
    title = "Four foldings, and where the time of an analysis goes"
    keep("analysis_foldings", title, "python benchmarks/analysis_foldings.py", figures, _tables(figures))


def _tables(figures: dict[str, Any]) -> str:
    count = figures["matrices"]
    rates = [
        [name.removeprefix("torch."), *(f"{value / GIGA:.0f}" for value in one.values())]
        for name, one in figures["rate"].items()
    ]
    limit, took = figures["limit_seconds"], figures["seconds"]["analysis, default folding"]
    parts = [
        f"{figures['network']}, random weights. A pass of svdvals is over {count['default folding']} float32 matrices, "
        f"one slice each, in the default folding, or over the {count['four foldings']} that differ in four foldings "
        "(a 1x1 kernel and a Linear layer have one). An analysis finds the errors of every number of slices.",
        markdown(["", f"seconds, {figures['threads']} threads", "CPU seconds, 1 thread"], _seconds_rows(figures)),
        "Ratios of these:",
        markdown(["", f"{figures['threads']} threads", "CPU, 1 thread"], _ratio_rows(figures)),
        "Where the time of the analysis with the default folding goes:",
        _profile_table(figures["profile"]),
        f"Products of square matrices, 10^9 multiply-adds in a second, by their side ({SIDES[0]} and {SIDES[1]}):",
        markdown(["", *map(str, SIDES)], rates),
        "The limit: at the best of these rates the multiply-adds of the Gram products take "
        f"{limit['torch.float64']:.2f} s in float64, as they are computed, and would take {limit['torch.float32']:.2f} "
        f"s in float32. The analysis takes {took:.2f} s: most of it is for eigenvalues, half of whose work LAPACK does "
        "as products of a matrix and a vector, at the speed of the memory.",
    ]
    return "\n\n".join(parts)


def _seconds_rows(figures: dict[str, Any]) -> list[list[str]]:
    alone = figures["cpu_seconds_one_thread"]
    return [[key, f"{value:.2f}", f"{alone[key]:.2f}"] for key, value in figures["seconds"].items()]


def _ratio_rows(figures: dict[str, Any]) -> list[list[str]]:
    pairs = [("default", "default"), ("four", "default"), ("four", "four")]
    words = {"default": "default folding", "four": "four foldings"}
    rows = []
    for ours, theirs in pairs:
        analysis, svdvals = f"analysis, {words[ours]}", f"svdvals, {words[theirs]}"
        ratios = (times[analysis] / times[svdvals] for times in (figures["seconds"], figures["cpu_seconds_one_thread"]))
        rows.append([f"{analysis} / {svdvals}", *(f"{ratio:.2f}x" for ratio in ratios)])
    return rows


def _profile_table(found: dict[str, Any]) -> str:
    whole, work = sum(found["thread_seconds"].values()), found["multiply_adds"]
    rows = [
        [name, f"{spent:.2f}", f"{100 * spent / whole:.0f} %", *_work_cells(work.get(name), spent)]
        for name, spent in found["thread_seconds"].items()
    ]
    header = ["part", "seconds, all threads", "share", "10^9 multiply-adds", "10^9 in a second of a thread"]
    return markdown(header, rows)


def _work_cells(work: float | None, spent: float) -> list[str]:
    return ["", ""] if work is None else [f"{work / GIGA:.2f}", f"{work / GIGA / spent:.1f}"]


if __name__ == "__main__":
    main()
