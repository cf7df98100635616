"""Seconds to analyse each torchvision model, beside one forward-backward pass at batch 32 of its standard input.

    python -m benchmarks.zoo.speed                      # all models: hours; --shard as for the sweep
    python -m benchmarks.zoo.speed --only 'resnet*'

Both are measured in one process, one after the other, on the same number of threads. Where a pass of 4 images, times
eight, takes more than three times the analysis, that is the row: it says so, and hours are saved. Where the activations
of 32 images do not fit into the memory, a smaller batch is measured and its time multiplied, too. Models of
`torchvision.models.quantization` are left out: unquantized they are models that stand in the list already.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import nn
from torchvision import models

from benchmarks.environment import RESULTS, markdown
from benchmarks.zoo import rows
from benchmarks.zoo.catalogue import share
from benchmarks.zoo.isolated import in_own_process
from benchmarks.zoo.sweep import facts
from benchmarks.zoo.torchvision_models import standard
from benchmarks.zoo.treatment import forward_backward
from lr_callback.analysis.analyze import analyze

BATCH = 32
_FEW = 4
_CLEAR = 3
ROWS = RESULTS / "zoo_speed.jsonl"
PAGE = RESULTS / "zoo_speed.md"
_GROUPS = (models, models.segmentation, models.detection, models.video, models.optical_flow)


def names() -> list[str]:
    """Return the names of the models."""
    return [name for group in _GROUPS for name in models.list_models(group)]


def measured(name: str) -> rows.Row:
    """Time a model's passes and its analysis."""
    torch.manual_seed(0)
    model = standard(name, 2).make()
    analysed = _seconds(lambda: analyze(model))
    largest = _batch(model, name)
    few = min(_FEW, largest)
    quick = _pass(model, name, few)
    batch = few if quick > _CLEAR * analysed else largest
    passed = quick if batch == few else _pass(model, name, batch)
    return {
        "status": "ok",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": batch,
        "pass_seconds": round(passed, 2),
        "analysis_seconds": round(analysed, 2),
        "ratio": round(analysed / passed, 4),
    }


def _pass(model: nn.Module, name: str, batch: int) -> float:
    """Return the seconds of a pass, as for :data:`BATCH` images."""
    model.zero_grad()
    gc.collect()
    return _seconds(lambda: forward_backward(model, standard(name, batch))) * BATCH / batch


def _batch(model: nn.Module, name: str) -> int:
    """Return the largest batch that fits into two thirds of the memory that is free.

    Two small ones, which also warm up, tell what an image takes; the smallest, if twice what it took does not fit.
    """
    held, first = _held(), _peak(model, name, 2)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 2 / 3
    if 2 * (first - held) > free:
        return 2
    second = _peak(model, name, _FEW)
    return next((batch for batch in (BATCH, 16, 8) if (second - first) / 2 * batch <= free), _FEW)


def _peak(model: nn.Module, name: str, batch: int) -> float:
    """Run a pass; return the most memory that the process has held until now, in bytes."""
    forward_backward(model, standard(name, batch))
    return _held()


def _held() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def page(kept: Sequence[rows.Row]) -> str:
    """Return the page of all rows."""
    full = [row for row in kept if row["status"] == "ok"]
    analysis, passes = (sum(row[name] for row in full) for name in ("analysis_seconds", "pass_seconds"))
    longer = [row["name"] for row in full if row["ratio"] > 1]
    table = markdown(
        ["model", "parameters", "analysis, seconds", "pass, seconds", "ratio", "measured at batch"],
        [_line(row) for row in sorted(full, key=lambda row: -row["ratio"])],
    )
    failed = "".join(f"- {row['name']}: {row['status']}\n" for row in kept if row["status"] != "ok")
    return (
        "# Seconds to analyse, beside one forward-backward pass at batch 32\n\n    python -m benchmarks.zoo.speed\n\n"
        f"{len(full)} models: {analysis:,.0f} s to analyse all, {passes:,.0f} s for a pass of each "
        f"(ratio {analysis / max(passes, 1e-9):.2f}). The analysis takes longer for {len(longer)}: "
        f"{', '.join(longer) or 'none'}.\nWhere a smaller batch was measured, its time is multiplied to that of 32: so "
        "few images\nare enough to tell, or 32 do not fit.\n\n"
        f"{table}\n\n{failed}\nMeasured with:\n\n{rows.environment_of(kept)}\n"
    )


def _line(row: rows.Row) -> list[str]:
    return [
        row["name"],
        f"{row['parameters']:,}",
        f"{row['analysis_seconds']:.2f}",
        f"{row['pass_seconds']:.2f}",
        f"{row['ratio']:.2f}",
        str(row["batch"]),
    ]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", help="which part of how many, such as 2/4; one after the other")
    parser.add_argument("--only", default="*", help="pattern of names, such as 'resnet*'")
    parser.add_argument("--new", action="store_true", help="only models without a row that is ok")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's")
    arguments = parser.parse_args()
    done = {row["key"] for row in rows.read(ROWS) if row["status"] == "ok"} if arguments.new else set()
    for name in share([name for name in names() if name not in done], arguments.only, arguments.shard):
        row = {"key": name, "name": name, **in_own_process(measured, name, arguments.threads)}
        rows.update({**row, "environment": facts("torchvision", arguments.threads)}, ROWS)
        print(row, flush=True)
    PAGE.write_text(page(rows.read(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    main()
