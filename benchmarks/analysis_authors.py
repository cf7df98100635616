"""Our analysis against the authors' code: CPU time for a budget, and the largest error at the same size.

    python benchmarks/analysis_authors.py --records RECORDS.json

The records are what the authors' method chose, a list of ``network``, ``keep_ratio_asked``, ``parameters``,
``parameters_dense``, ``cpu_seconds`` (of all, one thread), ``search_cpu_seconds`` (without the factors), and
``layers``: name -> ``num_slices`` and ``rank``, or null for one that stays dense. Ours may have as many parameters.
Both sides' errors are the worst slice's, which is what theirs minimises, computed in float64 from the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import isclose
from pathlib import Path
from time import process_time
from typing import Any

import torch
from analysis import network, warm_up
from environment import keep, markdown

import lr_callback as lrc
from lr_callback.decisions.candidates import Candidate, LayerCandidates

Record = dict[str, Any]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a run returns, and its CPU seconds, those of all threads."""
    start = process_time()
    return run(), process_time() - start


def compared(record: Record) -> Record:
    """Choose and factorize at the size that a record has, and evaluate both choices."""
    model = network(record["network"])
    ratio = record["parameters"] / record["parameters_dense"]
    analysis, analysing = timed(lambda: lrc.analyze(model, lrc.ALDS()))
    check_size(record, analysis)
    allocation, allocating = timed(lambda: analysis.allocate(ratio))
    _, factors = timed(lambda: lrc.factorize_(model, allocation))
    ours = {"analysis": analysing, "allocation": allocating, "factors": factors}
    found, whole = record["cpu_seconds"], sum(ours.values())
    return {
        **{key: record[key] for key in ("network", "keep_ratio_asked", "parameters", "parameters_dense")},
        "authors": {
            "cpu_seconds": found,
            "search_cpu_seconds": record["search_cpu_seconds"],
            "worst_error": worst_error(record, analysis),
        },
        "ours": {"cpu_seconds": ours, "worst_error": allocation.worst_error, "parameters": allocation.cost},
        "times_less": {
            "choice": record["search_cpu_seconds"] / (analysing + allocating),
            "choice and factors": found / whole,
        },
    }


def check_size(record: Record, analysis: lrc.Analysis) -> None:
    """Make sure that a record's choices cost what it says, by our count.

    Raises:
        ValueError: If they do not.
    """
    cost = analysis.dense_cost
    for name, choice in record["layers"].items():
        if choice is not None:
            layer = analysis.layers[name]
            cost += _candidate(layer, choice).cost(choice["rank"]) - layer.dense_cost
    if cost != record["parameters"]:
        raise ValueError(f"{record['network']}: {cost} parameters by our count, {record['parameters']} recorded.")


def worst_error(record: Record, analysis: lrc.Analysis) -> float:
    """Return the largest error of a record's choices."""
    chosen = {name: choice for name, choice in record["layers"].items() if choice is not None}
    return max(
        float(_candidate(analysis.layers[name], choice).errors[choice["rank"]]) for name, choice in chosen.items()
    )


def _candidate(layer: LayerCandidates, choice: dict[str, int]) -> Candidate:
    (found,) = (one for one in layer.candidates if one.num_slices == choice["num_slices"])
    return found


def main() -> None:
    """Compare and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    arguments = parser.parse_args()
    records = json.loads(arguments.records.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    warm_up(lrc.ALDS())
    rows = [compared(record) for record in records]
    figures = {"rows": rows, "least": _least(rows)}
    title = "The analysis against the authors' code"
    command = "python benchmarks/analysis_authors.py --records RECORDS.json"
    keep("analysis_authors", title, command, figures, _tables(figures))


def _least(rows: list[Record]) -> dict[str, float]:
    return {key: min(row["times_less"][key] for row in rows) for key in rows[0]["times_less"]}


def _tables(figures: dict[str, Any]) -> str:
    rows, least = figures["rows"], figures["least"]
    worse = [row for row in rows if not _no_worse(row)]
    parts = [
        "Theirs: ALDSNet of github.com/lucaslie/torchprune at commit 0932cbc, one shot: 15 seeds, four iterations of "
        "each, numpy's seed 0. What ran is a private transcription of what ALDSNet does between a network and its "
        "factors (no part of this repository): its choices are, layer for layer, those that were recorded of the code "
        "itself. It ran on the same machine as ours, one thread each. Weights are seeded, "
        "random. Ours may have as many parameters as theirs has.",
        "CPU seconds for one budget. Choosing is, of theirs, the search with the singular values that it looks at, "
        "and, of ours, the analysis (all candidates) with the allocation. After that each computes the factors:",
        markdown(["network", "kept", *_HEADER], [_time_cells(row) for row in rows]),
        f"Ours takes at least {least['choice']:.1f} times less to choose, and {least['choice and factors']:.1f} times "
        "less with the factors. The last column is what each further budget takes after the analysis. The factors, in "
        "more rounds: `analysis_factors.md`.",
        "Largest relative error of a layer (its worst slice's, by our exact count for both) at the same size:",
        markdown(
            ["network", "kept", "parameters, theirs", "ours", "error, theirs", "ours"],
            [_error_cells(row) for row in rows],
        ),
        f"Ours is worse in {len(worse)} of {len(rows)}.",
    ]
    return "\n\n".join(parts)


_CHOOSING = ("theirs, choosing", "ours, choosing", "less by")
_HEADER = (*_CHOOSING, "theirs, with factors", "ours, with factors", "less by", "ours, further budget")


def _no_worse(row: Record) -> bool:
    ours, theirs = row["ours"]["worst_error"], row["authors"]["worst_error"]
    return bool(ours <= theirs or isclose(ours, theirs, rel_tol=1e-9))


def _time_cells(row: Record) -> list[str]:
    theirs, ours, less = row["authors"], row["ours"]["cpu_seconds"], row["times_less"]
    chosen = ours["analysis"] + ours["allocation"]
    return [
        row["network"],
        f"{row['parameters'] / row['parameters_dense']:.3f}",
        *(f"{theirs['search_cpu_seconds']:.1f}", f"{chosen:.2f}", f"{less['choice']:.1f}x"),
        *(f"{theirs['cpu_seconds']:.1f}", f"{chosen + ours['factors']:.2f}", f"{less['choice and factors']:.1f}x"),
        f"{ours['allocation']:.3f}",
    ]


def _error_cells(row: Record) -> list[str]:
    theirs, ours = row["authors"], row["ours"]
    kept = f"{row['parameters'] / row['parameters_dense']:.3f}"
    errors = [f"{theirs['worst_error']:.4f}", f"{ours['worst_error']:.4f}"]
    return [row["network"], kept, str(row["parameters"]), str(ours["parameters"]), *errors]


if __name__ == "__main__":
    main()
