"""Snapshots: weights of one moment in a file that is always whole.

A file is written beside the one that it is to become, in the same folder, and takes its name in one step: whenever the
process is killed, the name stands for the former file or for the new one.
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


def write_snapshot(trainer: Trainer, name: str) -> dict[str, str]:
    """Write the weights of this moment; return name -> path."""
    with ExitStack() as undo:
        written = publish(trainer, write_part(trainer, name, undo))
        undo.pop_all()
    return written


def write_part(trainer: Trainer, name: str, undo: ExitStack) -> Path:
    """Write the weights of this moment under a name that is not yet that of the snapshot.

    Args:
        trainer: whose module is written.
        name: of the snapshot.
        undo: given what removes the file again, before it is written.

    Returns:
        The file's path, for :func:`publish`.
    """
    part = _folder(trainer) / f"{name}.ckpt.part"
    undo.callback(_remove, part)
    # As `Trainer.save_checkpoint` does, but for its barrier: where one process cannot write, the others must be told.
    weights = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    processes_of(trainer).agree(lambda: trainer.strategy.save_checkpoint(weights, part))
    return part


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


def _folder(trainer: Trainer) -> Path:
    """Return ``compression`` in the log folder; under ``fast_dev_run``, which leaves nothing behind, a scratch one."""
    if not is_smoke_test(trainer):
        return Path(trainer.log_dir or trainer.default_root_dir) / "compression"
    if trainer not in _SCRATCH:
        _SCRATCH[trainer] = Path(tempfile.mkdtemp(prefix="compression-"))
        finalize(trainer, shutil.rmtree, _SCRATCH[trainer], ignore_errors=True)
    return _SCRATCH[trainer]
