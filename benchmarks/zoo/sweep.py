"""The sweep over the models of a shard: each in a process of its own, with a row each."""

from __future__ import annotations

import traceback
from importlib.metadata import version
from time import perf_counter
from typing import Any

from benchmarks.environment import environment
from benchmarks.zoo import rows
from benchmarks.zoo.case import Case
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.isolated import in_own_process
from benchmarks.zoo.treatment import NothingToFactorizeError, treat


def found(key: str) -> rows.Row:
    """Return the row of a model; what goes wrong is its status."""
    started = perf_counter()
    try:
        row = {"status": "ok", **treat(catalogue()[key])}
    except NothingToFactorizeError as reason:
        row = {"status": "nothing to factorize", **reason.row}
    except Exception as error:
        traceback.print_exc()
        row = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    return {**row, "all_seconds": round(perf_counter() - started, 1)}


def run(case: Case, threads: int) -> rows.Row:
    """Treat a model, and put its row into the file."""
    row = {"key": case.key, "package": case.package, "name": case.name}
    row |= {**in_own_process(found, case.key, threads), "environment": facts(case.package, threads)}
    rows.update(row)
    print({name: value for name, value in row.items() if name not in ("environment", "package", "name")}, flush=True)
    return row


def facts(package: str, threads: int) -> dict[str, Any]:
    """Return what a row was measured with."""
    names = ("date", "python", "torch", "processor", "cores", "device")
    known = environment()
    return {name: known[name] for name in names} | {package: version(package), "threads": threads}


def note_missing() -> None:
    """Give each model that has no row one that says that it was not run."""
    known = {row["key"] for row in rows.read()}
    for key, case in catalogue().items():
        if key not in known:
            status = "not run: takes many minutes" if case.giant else "not run"
            row = {"key": key, "package": case.package, "name": case.name, "status": status, "environment": {}}
            rows.update(row)
