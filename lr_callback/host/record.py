"""Record: what a run with compressions has done so far, as its checkpoints keep it.

A value: each step of a run makes a new one, and what is undone puts the one before back. A state is checked as a whole
before anything of it is used; it may be of another version, or of another program that has a callback of this name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.curves import Curves
from lr_callback.model.observe import Observation

Part = TypeVar("Part")
VERSION = 3
_SINCE: Mapping[int, Mapping[str, object]] = {2: {"teacher": None, "stable_ranks": []}, 3: {"curves": None}}
"""Version -> the fields that it brought, with what stands for them in a record of an older one."""

_WAY_OUT = (
    "Take its weights alone: `lr_callback.load_from_checkpoint(cls, path)` or `lr_callback.restore_(model, path)`. "
    "The callback was not changed."
)


@dataclass(frozen=True)
class Record:
    """What a resumed run must know of the run before.

    Args:
        applied: epochs of the events that have passed, ascending.
        allocation: of the latest compression.
        observation: of one batch.
        start: where learning rates and schedulers began, as :mod:`lr_callback.edits.rewind` notes them.
        snapshot_files: name of a snapshot -> its path.
        teacher: the weights of the network before the first compression, of which a run with distillation learns.
        stable_ranks: epoch -> layer name -> stable rank at its start, of the latest epochs of a run that waits for them
            to settle.

    Example::

        >>> Record.from_dict(Record(applied=(1, 3)).to_dict()).last
        3
    """

    applied: tuple[int, ...] = ()
    allocation: Allocation | None = None
    observation: Observation | None = None
    start: dict[str, Any] | None = None
    snapshot_files: Mapping[str, str] = field(default_factory=dict)
    teacher: Mapping[str, Tensor] | None = None
    stable_ranks: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def curves(self) -> Curves | None:
        """What figures draw of the latest compression."""
        sampled = None if self.allocation is None else self.allocation.sampled
        return sampled if isinstance(sampled, Curves) else None

    @property
    def last(self) -> int:
        """The latest event that has passed; -1 if none has."""
        return max(self.applied, default=-1)

    def after(self, allocation: Allocation, passed: Iterable[int], curves: Curves | None = None) -> Record:
        """Return the record after a compression with which some events have passed; later snapshots are yet to come."""
        applied = tuple(sorted({*self.applied, *passed}))
        made = replace(allocation, sampled=curves)  # an analysis would stay in memory until the next one
        return replace(self.without_files("cut", "final"), allocation=made, applied=applied)

    def with_ranks(self, epoch: int, ranks: Mapping[str, float], most: int) -> Record:
        """Return the record with the stable ranks at the start of an epoch, and at most so many others before."""
        known = sorted({**self.stable_ranks, epoch: ranks}.items())
        return replace(self, stable_ranks=dict(known[-most:]))

    def with_files(self, written: Mapping[str, str]) -> Record:
        """Return the record with more snapshots, or newer ones."""
        return replace(self, snapshot_files={**self.snapshot_files, **written})

    def without_files(self, *names: str) -> Record:
        """Return the record without some snapshots: what has their names is of an earlier moment."""
        kept = {name: path for name, path in self.snapshot_files.items() if name not in names}
        return replace(self, snapshot_files=kept)

    def resumed(self, keeps_start: bool) -> Record:
        """Return what of it holds in a run that goes on from it: files may have gone since.

        Args:
            keeps_start: whether this run rewinds its learning rates.
        """
        present = {name: path for name, path in self.snapshot_files.items() if Path(path).is_file()}
        return replace(self, snapshot_files=present, start=self.start if keeps_start else None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, which ``torch.load(weights_only=True)`` takes."""
        return {
            "version": VERSION,
            "applied": list(self.applied),
            "allocation": None if self.allocation is None else self.allocation.to_dict(),
            "curves": None if self.curves is None else self.curves.to_dict(),
            "observation": None if self.observation is None else self.observation.to_dict(),
            "start": copy.deepcopy(self.start),
            "snapshot_files": dict(self.snapshot_files),
            "stable_ranks": [[epoch, dict(ranks)] for epoch, ranks in self.stable_ranks.items()],
            "teacher": None if self.teacher is None else dict(self.teacher),
        }

    @classmethod
    def from_dict(cls, written: object) -> Record:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a newer version wrote it, or it is damaged or foreign; the text says what to do.
        """
        parts = _checked(written)
        allocation, observation = parts["allocation"], parts["observation"]
        curves = None if parts["curves"] is None else _read("curves", Curves.from_dict, parts["curves"])
        made = None if allocation is None else _read("allocation", Allocation.from_dict, allocation)
        return cls(
            applied=tuple(parts["applied"]),
            allocation=None if made is None else replace(made, sampled=curves),
            observation=None if observation is None else _read("observation", Observation.from_dict, observation),
            start=copy.deepcopy(parts["start"]),
            snapshot_files=dict(parts["snapshot_files"]),
            teacher=parts["teacher"],
            stable_ranks={epoch: dict(ranks) for epoch, ranks in parts["stable_ranks"]},
        )


def _checked(written: object) -> dict[str, Any]:
    """Return the parts of a written record, each of the type that it must have."""
    if not isinstance(written, Mapping) or type(written.get("version")) is not int:
        raise _foreign("it must be a dict with a whole number as `version`", written)
    if written["version"] > VERSION:
        raise ValueError(
            f"LowRankCompression: the checkpoint was written by a newer lr_callback, its record of the run is of "
            f"version {written['version']}, this one reads up to {VERSION}. Update lr_callback to go on. {_WAY_OUT}"
        )
    for version, added in _SINCE.items():
        written = {**(added if written["version"] < version else {}), **written}
    names = set(_PARTS)
    differ = sorted(map(str, names ^ (written.keys() - {"version"})))
    if differ:
        raise _foreign(f"it must have the keys {sorted(names)}, missing or unknown are {differ}", sorted(written))
    for name, (holds, meant) in _PARTS.items():
        if not holds(written[name]):
            raise _foreign(f"`{name}` must be {meant}", written[name])
    return {name: written[name] for name in names}


def _read(name: str, read: Callable[[Mapping[str, Any]], Part], written: Mapping[str, Any]) -> Part:
    try:
        return read(written)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _foreign(f"`{name}` cannot be read ({type(error).__name__}: {error})", written) from error


def _foreign(must: str, found: object) -> ValueError:
    shown = repr(found)
    return ValueError(
        f"LowRankCompression: what the checkpoint holds under this callback's name is not a record of a run as "
        f"lr_callback writes it: {must}, got {shown[:80]}{'...' if len(shown) > 80 else ''}. The file is damaged, or "
        f"another program wrote it. {_WAY_OUT}"
    )


def _are_epochs(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is int and one >= 0 for one in value)


def _is_start(value: object) -> bool:
    kept = ("groups", "schedulers")
    return value is None or (isinstance(value, dict) and all(isinstance(value.get(name), list) for name in kept))


def _are_files(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair)


def _is_state(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _are_ranks(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 and type(one[0]) is int and _are_numbers(one[1])
        for one in value
    )


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, float) for k, v in value.items())


def _is_dict_or_none(value: object) -> bool:
    return value is None or isinstance(value, dict)


_PARTS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "applied": (_are_epochs, "a list of epochs, whole numbers from 0"),
    "allocation": (_is_dict_or_none, "a dict or None"),
    "curves": (_is_dict_or_none, "a dict or None"),
    "observation": (_is_dict_or_none, "a dict or None"),
    "start": (_is_start, "None or a dict with the lists `groups` and `schedulers`"),
    "snapshot_files": (_are_files, "a dict of names and paths"),
    "stable_ranks": (_are_ranks, "a list of epochs, each with a dict of names and numbers"),
    "teacher": (_is_state, "None or a dict of names and tensors"),
}
