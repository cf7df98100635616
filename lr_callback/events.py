"""Events: at the start of which epochs to compress, and to what fraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

from lr_callback.analysis import check_keep_ratio


def read_events(keep_ratio: object, epochs: object) -> dict[int, float]:
    """Return epoch -> fraction to keep, ascending.

    Args:
        keep_ratio: a number in (0, 1], or a list of them, one for each epoch.
        epochs: a whole number from 0, or a list of different ones.

    Raises:
        ValueError: If a ratio or an epoch is out of range, an epoch is repeated, or the lists differ in length.

    Example::

        >>> read_events([0.3, 0.5], [20, 10])
        {10: 0.5, 20: 0.3}
    """
    listed = [_epoch(epoch) for epoch in (epochs if isinstance(epochs, (list, tuple, range)) else [epochs])]
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"`epochs` must name at least one epoch and none twice, got {epochs!r}.")
    ratios = list(keep_ratio) if isinstance(keep_ratio, (list, tuple)) else [keep_ratio] * len(listed)
    if len(ratios) != len(listed):
        raise ValueError(
            f"`keep_ratio` must be one number, or one for each of the {len(listed)} `epochs` {listed}, "
            f"got {len(ratios)}: {keep_ratio!r}."
        )
    return dict(sorted(zip(listed, map(check_keep_ratio, ratios), strict=True)))


def _epoch(epoch: object) -> int:
    if isinstance(epoch, Integral) and not isinstance(epoch, bool) and int(epoch) >= 0:
        return int(epoch)
    raise ValueError(f"`epochs` must be whole numbers from 0, got {epoch!r}.")


def due(events: Mapping[int, float], applied: Iterable[int], epoch: int) -> float | None:
    """Return the fraction of the latest event up to an epoch, if none as late was applied; else None.

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
