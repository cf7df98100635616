"""Events: at the start of which epochs to compress, and to what fraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

from lr_callback.decisions.goals import Goal, check_goal, check_keep_ratio


def read_events(keep_ratio: object, epochs: object, ramp: bool = False) -> dict[int, Goal]:
    """Return epoch -> fraction to keep, or another goal, ascending.

    Args:
        keep_ratio: a number in (0, 1], or a list of them, one for each epoch; or another goal, for all of them.
        epochs: a whole number from 0, or a list of different ones.
        ramp: whether the one ratio is reached step by step over the epochs, see :func:`cubic_ramp`.

    Raises:
        ValueError: If a ratio or an epoch is out of range, an epoch is repeated, or the lists differ in length; or if
            there is a ramp with a list of ratios, or with one epoch.

    Example::

        >>> read_events([0.3, 0.5], [20, 10])
        {10: 0.5, 20: 0.3}
    """
    listed = [_epoch(epoch) for epoch in (epochs if isinstance(epochs, (list, tuple, range)) else [epochs])]
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"`epochs` must name at least one epoch and none twice, got {epochs!r}.")
    if ramp:
        if isinstance(keep_ratio, (list, tuple, Mapping)) or len(listed) < 2:
            raise ValueError(
                "`ramp` leads to one `keep_ratio` over at least two `epochs`, got "
                f"keep_ratio={keep_ratio!r} and epochs={epochs!r}."
            )
        return dict(cubic_ramp(check_keep_ratio(keep_ratio), listed))
    ratios = list(keep_ratio) if isinstance(keep_ratio, (list, tuple)) else [keep_ratio] * len(listed)
    if len(ratios) != len(listed):
        raise ValueError(
            f"`keep_ratio` must be one number, or one for each of the {len(listed)} `epochs` {listed}, "
            f"got {len(ratios)}: {keep_ratio!r}."
        )
    check = check_goal if isinstance(keep_ratio, Mapping) else check_keep_ratio
    return dict(sorted(zip(listed, map(check, ratios), strict=True)))


def cubic_ramp(keep_ratio: float, epochs: Iterable[int]) -> dict[int, float]:
    """Return epoch -> fraction to keep, from near 1 to the one asked for, in large steps first and small ones last.

    At the part ``t`` of the way, counted so that the last epoch has ``t = 1``, ``keep + (1 - keep) (1 - t)^3`` is kept.
    Where epochs are not evenly spaced, the way is measured in epochs.

    Args:
        keep_ratio: fraction to keep in the end, in (0, 1].
        epochs: at least two different ones.

    Source: Zhu, Gupta, "To prune, or not to prune", arXiv 1710.01878, equation (1), of sparsity; here of what is kept.

    Example::

        >>> {epoch: round(kept, 3) for epoch, kept in cubic_ramp(0.3, [10, 20, 30]).items()}
        {10: 0.507, 20: 0.326, 30: 0.3}
    """
    ordered = sorted(epochs)
    step = (ordered[-1] - ordered[0]) / (len(ordered) - 1)
    start, way = ordered[0] - step, ordered[-1] - ordered[0] + step
    return {epoch: keep_ratio + (1 - keep_ratio) * (1 - (epoch - start) / way) ** 3 for epoch in ordered}


def _epoch(epoch: object) -> int:
    if isinstance(epoch, Integral) and not isinstance(epoch, bool) and int(epoch) >= 0:
        return int(epoch)
    raise ValueError(f"`epochs` must be whole numbers from 0, got {epoch!r}.")


def due(events: Mapping[int, Goal], applied: Iterable[int], epoch: int) -> Goal | None:
    """Return the goal of the latest event up to an epoch, if none as late was applied; else None.

    Example::

        >>> due({10: 0.5, 20: 0.3}, applied=[], epoch=25), due({10: 0.5, 20: 0.3}, applied=[20], epoch=25)
        (0.3, None)
    """
    last = max(applied, default=-1)
    late = [event for event in events if last < event <= epoch]
    return events[max(late)] if late else None


def check_flags(holder: object, *names: str) -> None:
    """Refuse a switch that is neither True nor False: ``"no"`` would count as True.

    Args:
        holder: has the switches as attributes.
        names: of the attributes.

    Raises:
        TypeError: If there is one.
    """
    for name in names:
        if not isinstance(getattr(holder, name), bool):
            raise TypeError(f"`{name}` must be True or False, got {getattr(holder, name)!r}.")
