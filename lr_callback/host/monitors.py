"""Monitors: what compares a metric with its best so far begins anew after a compression.

The best of a dense model is of another model. Kept, it would stop the training within the patience of EarlyStopping,
and let ModelCheckpoint write no file with the compressed model in it, not even ``last.ckpt``, which is written only
along with a new best. Schedulers are no monitors here: a ReduceLROnPlateau goes on as it would have, like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import inf

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lr_callback.host.packages import callbacks_of, is_a


def reset_monitors(trainer: Trainer, undo: ExitStack) -> list[str]:
    """Let EarlyStopping and ModelCheckpoint forget the metrics that they have seen.

    Files stay where they are, and patience and all that is not about a best value stay as they are.

    Args:
        trainer: of either package.
        undo: given what puts everything back.

    Returns:
        The names of the classes of those that had seen a metric or written a file.
    """
    told: list[str] = []
    for callback in callbacks_of(trainer):
        fresh = _fresh(callback)
        if _differs(callback, fresh):
            told.append(type(callback).__name__)
            _set(callback, fresh, undo)
    return list(dict.fromkeys(told))


def announce_reset(names: Sequence[str]) -> None:
    """Tell the user which monitors began anew, if any; on rank zero."""
    if names:
        rank_zero_info(
            f"LowRankCompression: {', '.join(names)} begin anew, what was best so far was of the model before this "
            "compression. Checkpoints that were written stay; `reset_monitors=False` turns this off."
        )


def warn_of_no_best(trainer: Trainer) -> None:
    """Warn at the end of a run if the best file is of no model of it, so that ``ckpt_path="best"`` finds none.

    Args:
        trainer: of a run that has compressed, and let monitors begin anew.
    """
    for callback in callbacks_of(trainer):
        if is_a(callback, "ModelCheckpoint") and _has_no_best(callback):
            rank_zero_warn(
                f"LowRankCompression: {type(callback).__name__}(monitor={getattr(callback, 'monitor', None)!r}) has "
                "seen no metric since the latest compression, so it has no best file, and `trainer.test("
                "ckpt_path='best')` will be refused. Let a validation follow the last of `epochs`; or name a file: "
                f"those of the model before the compression are in {getattr(callback, 'dirpath', None)}."
            )


def _has_no_best(callback: object) -> bool:
    """Return whether a ModelCheckpoint with a monitor, which is to keep the best, has none."""
    keeps = bool(getattr(callback, "save_top_k", 0)) and getattr(callback, "monitor", None) is not None
    return keeps and getattr(callback, "best_model_path", None) == ""


def _fresh(callback: object) -> dict[str, object]:
    """Return the attributes that a callback has before it has seen a metric; none if it keeps no best.

    A ModelCheckpoint without a metric writes the latest model over the one before, whatever its structure.
    """
    worst = torch.tensor(-inf if getattr(callback, "mode", "min") == "max" else inf)
    if is_a(callback, "EarlyStopping"):
        return {"wait_count": 0, "best_score": worst}
    if is_a(callback, "ModelCheckpoint") and getattr(callback, "monitor", None) is not None:
        return {
            "best_k_models": {},
            "best_model_path": "",
            "best_model_score": None,
            "kth_best_model_path": "",
            "kth_value": worst,
            "current_score": None,
        }
    return {}


def _differs(one: object, fresh: Mapping[str, object]) -> bool:
    return any(bool(getattr(one, name) != value) for name, value in fresh.items())


def _set(one: object, values: Mapping[str, object], undo: ExitStack) -> None:
    """Set attributes, and register what sets them back; the values that they had are not edited."""
    for name, value in values.items():
        undo.callback(setattr, one, name, getattr(one, name))
        setattr(one, name, value)
