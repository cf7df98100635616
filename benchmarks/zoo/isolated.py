"""A function in a process of its own: its memory goes with it, and a crash is a row."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from benchmarks.zoo.rows import Row

TIMEOUT = 4 * 3600


def in_own_process(task: Callable[[str], Row], key: str, threads: int) -> Row:
    """Call a function of a module in a fresh process, with a number of torch threads.

    Returns:
        What it returned; or a row with only a status, beginning with ``failed``.
    """
    # A server that has imported the packages already forks each process, in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([task.__module__])
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, key, threads, sender))
    process.start()
    sender.close()
    row: Row = {"status": f"failed: no result within {TIMEOUT} seconds"}
    try:
        if results.poll(TIMEOUT):
            row = results.recv()
    except EOFError:
        process.join()
        row = {"status": f"failed: the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return row


def _child(task: Callable[[str], Row], key: str, threads: int, results: Connection) -> None:
    warnings.simplefilter("ignore")  # what packages say about their own models
    torch.set_num_threads(threads)
    results.send(task(key))
