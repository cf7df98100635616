"""Snapshots: weights of one moment in a file that is always whole.

A file is written beside the one that it is to become, in the same folder, and takes its name in one step: whenever the
process is killed, the name stands for the former file or for the new one.

A snapshot is no reason to end a training: where the file system refuses one it is left out, and a warning says so once
a run for each cause.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from weakref import WeakKeyDictionary, finalize

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import is_smoke_test

_SCRATCH: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()
"""Folders of smoke tests, removed with their Trainers."""
_SAID: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
"""Causes for which snapshots were left out, and that was said."""


def write_snapshot(trainer: Trainer, name: str) -> dict[str, str]:
    """Write the weights of this moment; return name -> path, nothing where it could not be written."""
    with ExitStack() as undo:
        written = publish(trainer, write_part(trainer, name, undo))
        undo.pop_all()
    return written


def write_part(trainer: Trainer, name: str, undo: ExitStack) -> Path | None:
    """Write the weights of this moment under a name that is not yet that of the snapshot.

    Args:
        trainer: whose module is written.
        name: of the snapshot.
        undo: given what removes the file again, before it is written.

    Returns:
        The file's path, for :func:`publish`; None, with a warning, if a process could not write it.
    """
    folder = _log_folder(trainer)
    # As `Trainer.save_checkpoint` does, but for its barrier: where one process cannot write, the others must be told.
    weights = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    part: Path | None = None

    def write() -> str | None:
        nonlocal part
        try:
            part = (folder or _scratch(trainer)) / f"{name}.ckpt.part"
            undo.callback(_remove, part)
            trainer.strategy.save_checkpoint(weights, part)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    problems = [problem for problem in processes_of(trainer).gather(write) if problem is not None]
    if not problems:
        return part
    if part is not None:
        _remove(part)
    _say_left_out(trainer, f"{name}.ckpt in {folder or 'a scratch folder'}", problems[0])
    return None


def _say_left_out(trainer: Trainer, snapshot: str, problem: str) -> None:
    cause, said = problem.partition(":")[0], _SAID.setdefault(trainer, set())
    if cause not in said:
        said.add(cause)
        rank_zero_warn(
            f"LowRankCompression: the snapshot {snapshot} could not be written ({problem}). It is left out, and so is "
            "each later one of this run for which that holds; a file of its name that is there is of an earlier "
            "moment. The training goes on; what compares the stages of the run goes without it. Give the Trainer a "
            "`default_root_dir`, or its logger a folder, that can be written to and has room; or `snapshots=False`."
        )


def publish(trainer: Trainer, part: Path | None) -> dict[str, str]:
    """Give a written snapshot its name, in place of an earlier one; return name -> path, nothing for None.

    That it cannot be renamed is a warning: the compression stands by then, and the weights are on the disk.
    """
    if part is None:
        return {}
    snapshot = part.with_suffix("")
    problem = processes_of(trainer).first(lambda: _rename(part, snapshot))
    if problem is None:
        return {snapshot.stem: str(snapshot)}
    rank_zero_warn(
        f"LowRankCompression: the snapshot {part} could not be renamed to {snapshot} ({problem}). "
        "The compression is not affected; the first file is whole, and the comparison of stages goes without it. "
        "Rename it by hand, or make room for the name before the next compression."
    )
    return {}


def _rename(part: Path, snapshot: Path) -> str | None:
    try:
        part.replace(snapshot)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _remove(part: Path) -> None:
    """Remove a file if it is there; what keeps it from being removed kept it from being written, and is told then."""
    with suppress(OSError):
        part.unlink()


def _log_folder(trainer: Trainer) -> Path | None:
    """Return ``compression`` in the log folder; None under ``fast_dev_run``, which leaves nothing behind."""
    return None if is_smoke_test(trainer) else Path(trainer.log_dir or trainer.default_root_dir) / "compression"


def _scratch(trainer: Trainer) -> Path:
    """Return a folder that goes with its Trainer."""
    if trainer not in _SCRATCH:
        _SCRATCH[trainer] = Path(tempfile.mkdtemp(prefix="compression-"))
        finalize(trainer, shutil.rmtree, _SCRATCH[trainer], ignore_errors=True)
    return _SCRATCH[trainer]
