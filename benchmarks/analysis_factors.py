"""The factors of a budget: the CPU time of the way they are computed, against that with all eigenvectors.

    python benchmarks/analysis_factors.py

A budget far below the network leaves one rank to each slice of the widest layers, and the package computes the first
eigenvector of such a slice, not all of them. Both ways take turns on the same network and the same choices; what is
kept are medians of CPU seconds, one thread. The yardstick beside them is one float64 `eigh` of the Gram matrices of
all layers, unsliced, in the same round. The budgets are those of `analysis_authors.py`, whose figures of the authors'
code are the last columns' numerator: they were measured in another run, with the environment that their file names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from analysis import matrices, network, warm_up
from analysis_authors import timed
from environment import RESULTS, keep, markdown
from torch import Tensor, nn

import lr_callback as lrc
from lr_callback.common.parallel import Workers
from lr_callback.edits import build
from lr_callback.mathematics.spectrum import is_wide
from lr_callback.mathematics.truncation import balanced

Row = dict[str, Any]
Truncate = Callable[[Tensor, int, Workers], tuple[Tensor, Tensor]]


def by_all_vectors(slices: Tensor, rank: int, workers: Workers) -> tuple[Tensor, Tensor]:
    """Return what the package's ``truncate`` returns, from full decompositions of whole Gram matrices."""
    oriented = (slices if is_wide(slices) else slices.mT).double()
    vectors = [torch.linalg.eigh(one @ one.mT).eigenvectors.flip(-1)[:, :rank] for one in oriented]
    left, right = balanced(torch.stack(vectors), torch.stack(vectors).mT @ oriented)
    return (left, right) if is_wide(slices) else (right.mT, left.mT)


def eigenvectors(model: nn.Module) -> None:
    """Decompose the Gram matrix of every layer."""
    for matrix in matrices(model):
        double = matrix.double()
        torch.linalg.eigh(double @ double.mT if is_wide(double) else double.mT @ double)


def factors(model: nn.Module, allocation: lrc.Allocation, truncate: Truncate) -> float:
    """Return the CPU seconds of a surgery whose factors a function computes."""
    before, copy = build.truncate, deepcopy(model)
    build.truncate = truncate
    try:
        return timed(lambda: lrc.factorize_(copy, allocation))[1]
    finally:
        build.truncate = before


def measured(name: str, authors: list[Row], rounds: int) -> list[Row]:
    """Return a row for each budget of a network."""
    model, truncate = network(name), build.truncate
    analyses = [timed(lambda: lrc.analyze(model, lrc.ALDS())) for _ in range(rounds)]
    rows = []
    for record in authors:
        ratio = record["parameters"] / record["parameters_dense"]
        allocation, allocating = timed(partial(analyses[0][0].allocate, ratio))
        turns = [
            (
                factors(model, allocation, truncate),
                factors(model, allocation, by_all_vectors),
                timed(lambda: eigenvectors(model))[1],
            )
            for _ in range(rounds)
        ]
        row = dict(
            zip(("factors", "all_vectors", "eigh"), (median(one) for one in zip(*turns, strict=True)), strict=True)
        )
        row |= {"times_less": median(full / own for own, full, _ in turns)}
        row |= {"analysis": median(one[1] for one in analyses), "allocation": allocating}
        rows.append({"network": name, "kept": ratio, **row, "authors": record["authors"]["cpu_seconds"]})
        print(rows[-1], flush=True)
    return rows


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    chosen = row["analysis"] + row["allocation"]
    own, full = chosen + row["factors"], chosen + row["all_vectors"]
    return [
        row["network"],
        *(f"{row[key]:.3f}" for key in ("kept", "eigh", "all_vectors", "factors")),
        f"{row['times_less']:.2f}x",
        *(f"{value:.2f}" for value in (chosen, full, own)),
        *(f"{row['authors'] / value:.1f}x" for value in (full, own)),
    ]


HEADER = (
    "network",
    "kept",
    "one eigh of each layer",
    "factors, all eigenvectors",
    "factors",
    "less by",
    "choice",
    "with factors, all eigenvectors",
    "with factors",
    "theirs, as kept, by the former",
    "by the latter",
)


def main() -> None:
    """Measure both networks at all budgets, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    authors = json.loads((RESULTS / "analysis_authors.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    warm_up(lrc.ALDS())
    names = dict.fromkeys(row["network"] for row in authors["rows"])
    rows = [
        row
        for name in names
        for row in measured(name, [one for one in authors["rows"] if one["network"] == name], arguments.rounds)
    ]
    theirs = authors["environment"]
    text = (
        "CPU seconds, one thread, medians; both ways of computing factors took turns. Choice is the analysis with the "
        "allocation. The last two columns divide the CPU seconds that `analysis_authors.json` keeps of the authors' "
        f"code, measured in another run (on {theirs['date']}, {theirs['processor']}, torch {theirs['torch']}), by ours."
    )
    title = "The factors of a budget"
    keep("analysis_factors", title, "python benchmarks/analysis_factors.py", {"rows": rows}, _page(text, rows))


def _page(text: str, rows: list[Row]) -> str:
    return f"{text}\n\n{markdown(HEADER, map(cells, rows))}"


if __name__ == "__main__":
    main()
