"""The sweep over the models of a shard: each in a process of its own, with a row each."""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from importlib.metadata import version
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.zoo import rows
from benchmarks.zoo.case import Case
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.treatment import NothingToDo, treat

TIMEOUT = 4 * 3600


def found(case: Case) -> rows.Row:
    """Return the row of a model; what goes wrong is its status."""
    started = perf_counter()
    try:
        row = {"status": "ok", **treat(case)}
    except NothingToDo as reason:
        row = {"status": "nothing to factorize", **reason.row}
    except Exception as error:
        traceback.print_exc()
        row = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    return {**row, "all_seconds": round(perf_counter() - started, 1)}


def _child(key: str, threads: int, results: Connection) -> None:
    warnings.simplefilter("ignore")  # what packages say about their own models
    torch.set_num_threads(threads)
    results.send(found(catalogue()[key]))


def in_own_process(case: Case, threads: int) -> rows.Row:
    """Treat a model in a fresh process: its memory goes with it, and a crash is a row."""
    # A server that has imported the packages already forks each process, in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case.key, threads, sender))
    process.start()
    sender.close()
    row: rows.Row = {"status": f"failed: no result within {TIMEOUT} seconds"}
    try:
        if results.poll(TIMEOUT):
            row = results.recv()
    except EOFError:
        process.join()
        row = {"status": f"failed: the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return row


def run(case: Case, threads: int) -> rows.Row:
    """Treat a model, and put its row into the file."""
    row = {"key": case.key, "package": case.package, "name": case.name}
    row |= {**in_own_process(case, threads), "environment": _environment(case.package, threads)}
    rows.update(row)
    print({name: value for name, value in row.items() if name not in ("environment", "package", "name")}, flush=True)
    return row


def _environment(package: str, threads: int) -> dict[str, Any]:
    names = ("date", "python", "torch", "processor", "cores", "device")
    return {name: environment()[name] for name in names} | {package: version(package), "threads": threads}
