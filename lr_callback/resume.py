"""Resume: what a file that was written between two epochs says about the loops."""

from __future__ import annotations

from typing import Any


def begin_epoch_anew(checkpoint: dict[str, Any]) -> None:
    """Let a run that is resumed from a file of an epoch's start hooks train that epoch.

    Such a file is written when something fails or is interrupted in a compression and a checkpoint is kept of that
    moment. It says of the epoch that it is ready, not that it has started, and of the batches that all are done: those
    of the epoch before. Lightning then takes the new epoch's batches for done and leaves them out. What is written here
    instead is what a file from the end of the epoch before says.

    Args:
        checkpoint: as it was read, before the loops take over their part; edited in place.

    Example::

        >>> counted = {"ready": 3, "started": 2, "processed": 2, "completed": 2}
        >>> progress = {"total": dict(counted), "current": dict(counted)}
        >>> begin_epoch_anew({"loops": {"fit_loop": {"epoch_progress": progress}}})
        >>> progress["current"]
        {'ready': 2, 'started': 2, 'processed': 2, 'completed': 1}
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    total = progress.get("total", {})
    done = total.get("completed")
    if total != {"ready": (done or 0) + 1, "started": done, "processed": done, "completed": done}:
        return
    for counters in progress.values():
        finished = counters["processed"]
        counters.update(ready=finished, started=finished, completed=max(finished - 1, 0))
