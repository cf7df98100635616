"""Recorded: what a checkpoint says of its run by itself, without its model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lr_callback.commands.stages import TITLES
from lr_callback.common.table import listed
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.factorization import Spending
from lr_callback.files.noted import noted_allocation
from lr_callback.files.source import state_dict_of
from lr_callback.host.record import Record
from lr_callback.observation.report import Stage

_OF_THE_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "lr_callback_optimizer_names")
"""Entries of a checkpoint that a snapshot of the weights does not have."""
NOW = "this checkpoint"
"""What a person calls the stage that the checkpoint is."""


@dataclass(frozen=True)
class Recorded:
    """What a checkpoint says of its run.

    Args:
        record: of the callback; of a file that has its allocation alone, that.
        allocation: of the latest compression.
        snapshots: name -> file, of those that are there, in the order of the run.
        file_bytes: of a file of the weights alone, as a snapshot is.
        scores: monitored metric -> its value at this checkpoint, and the best one, where a callback kept them.
        training: what the file says of the training: name -> value.
    """

    record: Record
    allocation: Allocation
    snapshots: Mapping[str, Path]
    file_bytes: int
    scores: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, Path]:
        """The snapshots that are stages of their own: the last one is what the run ended with."""
        return {name: path for name, path in self.snapshots.items() if name != "final"}

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages, as far as they are known without the model."""
        own = Spending(self.allocation.cost, self.allocation.dense_cost, self.allocation.budget)
        spent = {self.allocation.unit: own, **self.allocation.others}
        dense = {unit: one.dense_cost for unit, one in spent.items()}
        now = {unit: one.cost for unit, one in spent.items()}
        files = {name: path.stat().st_size for name, path in self.snapshots.items()}
        between = [_stage(TITLES["cut"], now, files["cut"])] if "cut" in files else []
        return (_stage(TITLES["dense"], dense, files.get("dense", 0)), *between, _stage(NOW, now, self.file_bytes))


def _stage(name: str, counts: Mapping[str, int], file_bytes: int) -> Stage:
    return Stage(name, {}, counts.get("parameters", 0), counts.get("multiply_adds", 0), file_bytes, 0.0)


def recorded(checkpoint: Path, loaded: Mapping[str, Any]) -> Recorded:
    """Read what a checkpoint says.

    Args:
        checkpoint: the file.
        loaded: what is in it.

    Raises:
        ValueError: If it is of no run with a compression, or of one before it; or if its record cannot be read.
    """
    record = _record(loaded)
    if record is not None and record.allocation is None:
        raise ValueError(
            f"--checkpoint {checkpoint}: must be of a moment after a compression, found that none had been made yet; "
            "give a later checkpoint of the run."
        )
    allocation = noted_allocation(loaded) if record is None else record.allocation
    if allocation is None:
        raise _without(checkpoint)
    record = record or Record(allocation=allocation)
    return Recorded(
        record, allocation, _snapshots(checkpoint, record), _bytes(loaded), _scores(loaded), _training(loaded)
    )


def _callbacks(loaded: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    states = loaded.get("callbacks")
    return [one for one in states.values() if isinstance(one, Mapping)] if isinstance(states, Mapping) else []


def _record(loaded: Mapping[str, Any]) -> Record | None:
    """Return the record of the callback, whatever its class is called; None if there is none."""
    found = [one for one in _callbacks(loaded) if {"allocation", "applied"} <= one.keys()]
    return Record.from_dict(found[-1]) if found else None


def _without(checkpoint: Path) -> ValueError:
    """Return the refusal of a file that says nothing of a compression; it names files that may do so."""
    folder = checkpoint.resolve().parent.parent / "checkpoints"
    others = [str(path) for path in sorted(folder.glob("*.ckpt")) if path.resolve() != checkpoint.resolve()]
    near = f" Beside it are {listed(others)}." if others else ""
    return ValueError(
        f"--checkpoint {checkpoint}: must be written by a Trainer with LowRankCompression, found nothing in it that "
        "says what became of the layers. A snapshot, or a file of weights alone (of torch.save, or of "
        f"ModelCheckpoint(save_weights_only=True)), does not; give a checkpoint with the state of the training.{near}"
    )


def _snapshots(checkpoint: Path, record: Record) -> dict[str, Path]:
    """Return the snapshots that are there: beside the checkpoint's folder, for runs are moved, or where they were."""
    found: dict[str, Path] = {}
    for name in [name for name in TITLES if name in record.snapshot_files]:
        noted = Path(record.snapshot_files[name])
        beside = checkpoint.resolve().parent.parent / noted.parent.name / noted.name
        here = [path for path in (beside, noted) if path.is_file()]
        found |= {name: here[0]} if here else {}
    return found


def _bytes(loaded: Mapping[str, Any]) -> int:
    """Return how large a file is that holds what a snapshot does."""
    state_dict_of(loaded)  # raises where there are no weights
    written = io.BytesIO()
    kept = {name: value for name, value in loaded.items() if name not in _OF_THE_TRAINING}
    torch.save(kept if "state_dict" in loaded else dict(loaded), written)
    return written.tell()


def _scores(loaded: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics that ModelCheckpoint compared."""
    scores = {}
    for state in _callbacks(loaded):
        monitor = state.get("monitor")
        for key, told in (("current_score", "at this checkpoint"), ("best_model_score", "best so far")):
            value = state.get(key)
            if isinstance(monitor, str) and isinstance(value, (Tensor, float)):
                scores[f"{monitor}, {told}"] = f"{float(value):.4g}"
    return scores


def _training(loaded: Mapping[str, Any]) -> dict[str, str]:
    told = {"epoch": "epoch of the checkpoint, from 0", "global_step": "optimizer steps until then"}
    known = {title: str(loaded[key]) for key, title in told.items() if isinstance(loaded.get(key), int)}
    version = loaded.get("pytorch-lightning_version")
    return {**known, **({"Lightning that wrote it": version} if isinstance(version, str) else {})}
