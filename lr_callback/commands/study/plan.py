"""Plan: which runs a study has, and what tells two of them apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal

from lr_callback.decisions.methods import Method, best_method

CONTROL = "dense"
"""Name of the runs of the network as it is, trained for the same epochs."""


_SWITCHES = ("correct_biases", "rebase_batchnorm")


@dataclass(frozen=True)
class Treatment:
    """What is done to a network to make it smaller: by the callback, or by filter pruning.

    Args:
        method: of the callback, that chooses the ranks. With neither a method nor a refit it is the callback as it is
            by default, with both.
        refit: see ``LowRankCompression``; None: not at all, as for a method of the paper.
        recalibrate_batchnorm: see ``LowRankCompression``.
        calibration_batches: see ``LowRankCompression``.
        correct_biases: see ``LowRankCompression``.
        rebase_batchnorm: see ``LowRankCompression``.
        filter_pruning: drop whole filters by this norm of their weights, with the library torch-pruning, and do none of
            the above.

    Raises:
        ValueError: If it is filter pruning, and something that is the callback's.

    Example::

        >>> Treatment(refit="cut").settings()["refit"]
        'cut'
    """

    method: Method | None = None
    refit: Literal["auto", "cut", "dense"] | None = None
    recalibrate_batchnorm: bool = False
    calibration_batches: int = 8
    filter_pruning: Literal["l1", "l2"] | None = None
    correct_biases: bool = True
    rebase_batchnorm: bool = True

    def __post_init__(self) -> None:
        """Refuse what would not be done."""
        if self.filter_pruning and (self.method or self.refit or self.recalibrate_batchnorm):
            raise ValueError(
                f"`filter_pruning`={self.filter_pruning!r} is done without the callback: `method`, `refit` and "
                "`recalibrate_batchnorm` must be left out, found one of them; give them a name of their own in "
                "`methods`."
            )

    def settings(self) -> dict[str, Any]:
        """Return it as plain data."""
        if self.filter_pruning:
            return {"filter_pruning": self.filter_pruning}
        method = best_method() if self.method is None else self.method
        written = {**asdict(self), **self.options, "method": method.to_dict()}
        # A switch that is on is left out: runs from before there was one are the same.
        return {name: value for name, value in written.items() if name not in _SWITCHES or value is not True}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the callback."""
        names = ("method", "refit", "recalibrate_batchnorm", "calibration_batches", *_SWITCHES)
        refit = "auto" if self.method is None and self.refit is None else self.refit
        return {name: getattr(self, name) for name in names} | {"refit": refit}


@dataclass(frozen=True)
class Run:
    """One network that is made smaller, and trained on.

    Args:
        name: of the treatment, or :data:`CONTROL`.
        keep_ratio: fraction of the parameters to keep; 1 for the control.
        seed: of all that is drawn.
    """

    name: str
    keep_ratio: float
    seed: int

    def __str__(self) -> str:
        """Return what a person calls it."""
        kept = "" if self.name == CONTROL else f", keep {self.keep_ratio:g}"
        return f"{self.name}{kept}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study: every treatment at every size, and a dense control, for every seed.

    Args:
        treatments: name -> what is done.
        keep_ratios: fractions of the parameters to keep, in (0, 1).
        seeds: of the runs; the spread over them is shown.
        epochs: of training after the cut, the same for all; 0: none.
        dense_epochs: of training before the cut; 0: the network comes trained.

    Raises:
        ValueError: If one of these cannot be meant.

    Example::

        >>> plan = Plan({"ALDS": Treatment()}, keep_ratios=[0.5, 0.3], seeds=[0])
        >>> [str(run) for run in plan.runs()]
        ['dense, seed 0', 'ALDS, keep 0.5, seed 0', 'ALDS, keep 0.3, seed 0']
    """

    treatments: Mapping[str, Treatment]
    keep_ratios: Sequence[float]
    seeds: Sequence[int] = (0,)
    epochs: int = 0
    dense_epochs: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.treatments:
            raise ValueError("`methods` must name at least one method, for example {ALDS: {}}, got none.")
        if CONTROL in self.treatments:
            raise ValueError(
                f"`methods`: {CONTROL!r} is the name of the control, which every study has; choose another."
            )
        _check_listed("keep_ratios", self.keep_ratios)
        _check_listed("seeds", self.seeds)
        for ratio in self.keep_ratios:
            if not 0 < ratio < 1:
                raise ValueError(
                    "`keep_ratios` must be numbers in (0, 1), fractions of the parameters to keep, all of which the "
                    f"dense control has, got {ratio}."
                )
        for name in ("epochs", "dense_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def runs(self) -> list[Run]:
        """Return the runs in their order: one seed after the other, its control first."""
        found: list[Run] = []
        for seed in self.seeds:
            found.append(Run(CONTROL, 1.0, seed))
            found += [Run(name, ratio, seed) for ratio in self.keep_ratios for name in self.treatments]
        return found

    def key(self, run: Run, setting: Mapping[str, Any]) -> str:
        """Return what runs of equal settings share, and others do not; the name of a treatment is none of them.

        Args:
            run: of this plan.
            setting: what all runs have in common, as plain data: network, data, Trainer.
        """
        treatment = None if run.name == CONTROL else self.treatments[run.name].settings()
        own = {"treatment": treatment, "keep_ratio": run.keep_ratio, "seed": run.seed, "epochs": self.epochs}
        return digest({**setting, **own, "dense_epochs": self.dense_epochs})


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short name for plain data.

    Example::

        >>> digest({"a": 1, "b": 2}) == digest({"b": 2.0, "a": 1}) != digest({"a": 1, "b": 3})
        True
    """
    written = json.dumps(_with_floats(settings), sort_keys=True, default=str)
    return sha256(written.encode()).hexdigest()[:16]


def _with_floats(value: object) -> object:
    """Return plain data with every number as a float: a file may say 2, and a default 2.0."""
    if isinstance(value, Mapping):
        return {name: _with_floats(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_floats(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_listed(name: str, values: Sequence[float]) -> None:
    if not values:
        raise ValueError(f"`{name}` must have at least one entry, got none.")
    if len(set(values)) != len(values):
        raise ValueError(f"`{name}` must be different from each other, got {list(values)}.")
