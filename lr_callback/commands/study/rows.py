"""Rows: what came of each run of a study, as plain data, and their summary over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from statistics import mean, stdev
from typing import Any

from lr_callback.commands.study.plan import CONTROL
from lr_callback.common.table import align


@dataclass(frozen=True)
class Row:
    """What came of one run.

    Args:
        key: of its settings.
        method: name of the treatment, or :data:`~lr_callback.commands.study.plan.CONTROL`.
        keep_ratio: fraction of the parameters that was asked for.
        seed: of the run.
        epochs: of training after the cut.
        parameters: of the network that was made; None: none was.
        multiply_adds: of one batch of the evaluation; None: not counted.
        kept_parameters: fraction of the dense network's.
        kept_multiply_adds: fraction of the dense network's.
        right_after: metric -> value, before any training; None: it was not finite.
        after: metric -> value, after the training; empty without any.
        seconds: that the run took.
        reason: why nothing was made; None: something was.
        finished: date and time.
        environment: index of the environment in the file.
        network: its name in a study of several; empty in one of one.
    """

    key: str
    method: str
    keep_ratio: float
    seed: int
    epochs: int
    parameters: int | None = None
    multiply_adds: int | None = None
    kept_parameters: float | None = None
    kept_multiply_adds: float | None = None
    right_after: Mapping[str, float | None] = field(default_factory=dict)
    after: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    finished: str = ""
    environment: int = 0
    network: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data; a metric that is not finite, which JSON does not know, is None."""
        return {**vars(self), "right_after": _known(self.right_after), "after": _known(self.after)}

    def cells(self) -> dict[str, Any]:
        """Return it flat, for one line of a table: metrics by ``right_after_NAME`` and ``after_NAME``."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("right_after", "after")}
        metrics = {f"right_after_{name}": value for name, value in self.right_after.items()}
        return {**plain, **metrics, **{f"after_{name}": value for name, value in self.after.items()}}

    def at(self, moment: str, metric: str) -> float | None:
        """Return a metric ``right_after`` or ``after``."""
        values: Mapping[str, float | None] = getattr(self, moment)
        return values.get(metric)


def _known(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is not None and isfinite(value) else None for name, value in metrics.items()}


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Args:
        values: at least one.

    Example::

        >>> str(Spread((1.0, 2.0, 3.0))), str(Spread((1.0,)))
        ('2.00 ±1.00', '1.00')
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample; 0 of one value."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        """Return the mean, and the deviation of more than one value."""
        return f"{self.mean:.2f}" + (f" ±{self.deviation:.2f}" if len(self.values) > 1 else "")


def choose_metric(names: Sequence[str], asked: str | None = None) -> str:
    """Return the metric that a study is shown by: the one asked for, else the first accuracy, else the first loss.

    Raises:
        ValueError: If the one that was asked for is not logged, or nothing is.

    Example::

        >>> choose_metric(["test_loss", "test_accuracy"])
        'test_accuracy'
    """
    if not names:
        raise ValueError(
            "`model`: its test step, or its validation step, must log a metric, for example "
            "self.log('test_accuracy', ...), and there must be data for it; found none."
        )
    if asked is not None and asked not in names:
        raise ValueError(f"`metric` must be one of {list(names)}, which the model's test logs, got {asked!r}.")
    ranked = sorted(names, key=lambda name: ("acc" not in name, "loss" not in name))
    return asked or ranked[0]


def in_percent(metric: str) -> bool:
    """Return whether a metric is a share that is shown in percent."""
    return "acc" in metric


def spread(rows: Sequence[Row], moment: str, metric: str) -> Spread | None:
    """Return a metric over rows, in percent where it is a share; None if no row has it."""
    values = [row.at(moment, metric) for row in rows]
    factor = 100 if in_percent(metric) else 1
    known = tuple(factor * value for value in values if value is not None)
    return Spread(known) if known else None


def by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each network, in the order of the first ones."""
    return {name: [row for row in rows if row.network == name] for name in dict.fromkeys(row.network for row in rows)}


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Return the rows of one network that something was made in, by method and keep ratio, in their order."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.reason is None:
            found.setdefault((row.method, row.keep_ratio), []).append(row)
    return found


def difference(rows: Sequence[Row], controls: Sequence[Row], moment: str, metric: str) -> Spread | None:
    """Return how far a metric is from the dense control's of the same seed."""
    dense = {row.seed: row.at(moment, metric) for row in controls}
    pairs = [(row.at(moment, metric), dense.get(row.seed)) for row in rows]
    factor = 100 if in_percent(metric) else 1
    known = tuple(factor * (own - other) for own, other in pairs if own is not None and other is not None)
    return Spread(known) if known else None


def summary(rows: Sequence[Row], metric: str) -> str:
    """Return a table of all methods and sizes, over seeds, and the reasons of runs that made nothing, by network."""
    parts = [
        f"{name}\n{_summary(own, metric)}" if name else _summary(own, metric) for name, own in by_network(rows).items()
    ]
    return "\n\n".join(parts)


def _summary(rows: Sequence[Row], metric: str) -> str:
    groups = grouped(rows)
    controls = groups.get((CONTROL, 1.0), [])
    moment = "after" if any(row.after for row in rows) else "right_after"
    epochs = max((row.epochs for row in rows), default=0)
    unit = f"{metric} %" if in_percent(metric) else metric
    header = ["method", "keep", "parameters %", "multiply-adds %", f"{unit}, right after"]
    header += [f"after {epochs} epochs"] if moment == "after" else []
    lines = []
    for (name, ratio), own in groups.items():
        kept = [_percent([row.kept_parameters for row in own]), _percent([row.kept_multiply_adds for row in own])]
        shown = [spread(own, one, metric) for one in ("right_after", "after")[: len(header) - 4]]
        shown.append(None if name == CONTROL else difference(own, controls, moment, metric))
        lines.append([name, f"{ratio:g}", *kept, *("-" if one is None else str(one) for one in shown)])
    table = align([*header, "- dense"], lines, right=frozenset(range(1, len(header) + 1)))
    reasons = [f"{row.method}, keep {row.keep_ratio:g}, seed {row.seed}: {row.reason}" for row in rows if row.reason]
    return "\n".join([table, *reasons])


def _percent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * mean(known):.1f}" if known else "-"
