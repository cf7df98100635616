"""Resume: what a file that was written around the start of an epoch says about the loops.

A compression is due in the hooks of an epoch's start. Lightning 2.6 leaves them out for a run that is resumed from a
file of the last batch of an epoch, and leaves out the batches for one from a file of those hooks themselves. Both
files are read here as one from the end of the epoch before, after which both the hooks and the batches come.
"""

from __future__ import annotations

from typing import Any


def begin_epoch_anew(checkpoint: dict[str, Any]) -> None:
    """Let a run that is resumed from a file of the turn of an epoch begin the new epoch with its hooks and batches.

    Two files are meant. One is written in the hooks of an epoch's start, as when something fails there and a checkpoint
    is kept of that moment: it says of the epoch that it is ready but has not started, and of the batches that all are
    done, those of the epoch before. The other is written after an epoch's last batch and before the validation, as with
    ``every_n_train_steps``. (The validation is left out when such a run is resumed, by Lightning itself as well.)

    Args:
        checkpoint: as it was read, before the loops take over their part; edited in place.

    Example::

        >>> counted = {"ready": 3, "started": 2, "processed": 2, "completed": 2}
        >>> progress = {"total": dict(counted), "current": dict(counted)}
        >>> begin_epoch_anew({"loops": {"fit_loop": {"epoch_progress": progress}}})
        >>> progress["current"]
        {'ready': 2, 'started': 2, 'processed': 2, 'completed': 1}
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {})
    batches = loop.get("epoch_loop.batch_progress", {})
    if _is_after_last_batch(epochs, batches):
        for counters in (batches["total"], batches["current"]):
            counters["completed"] = counters["processed"]
        for counters in epochs.values():
            counters["processed"] = counters["started"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    elif _is_before_first_batch(epochs):
        for counters in epochs.values():
            finished = counters["processed"]
            counters.update(ready=finished, started=finished, completed=max(finished - 1, 0))


def _is_before_first_batch(epochs: dict[str, Any]) -> bool:
    """Return whether an epoch's start hooks were running."""
    total = epochs.get("total", {})
    done = total.get("completed", 0)
    return bool(total == {"ready": done + 1, "started": done, "processed": done, "completed": done})


def _is_after_last_batch(epochs: dict[str, Any], batches: dict[str, Any]) -> bool:
    """Return whether an epoch's last batch was trained, and its end or its validation not begun."""
    total = epochs.get("total", {})
    done, counters = total.get("completed", 0), batches.get("total", {})
    if not batches.get("is_last_batch") or total != _unfinished(done):
        return False
    return bool(counters == {**dict.fromkeys(counters, counters["ready"]), "completed": counters["ready"] - 1})


def _unfinished(done: int) -> dict[str, int]:
    return {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
