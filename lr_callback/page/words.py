"""Words: what the numbers of a page mean, in plain sentences, also where the compression did not help."""

from __future__ import annotations

from lr_callback.decisions.costs import spoken
from lr_callback.observation.report import Stage, are_unsteady, spread_of
from lr_callback.page.facts import Facts

MARGIN = 0.05
"""Part of a time by which another must differ, at the least, to be called faster or slower."""
_SAME = 0.0005
"""Difference of an accuracy, of those up to 1, that is no difference."""


def verdict(facts: Facts) -> list[str]:
    """Return the sentences: on the size, on the time, on the accuracy, as far as each is known."""
    if not facts.allocation.factorized:
        return ["No layer was factorized: the network is as it was."]
    return [one for one in (_on_size(facts), _on_time(facts), _on_accuracy(facts)) if one]


def is_share(name: str, *values: float) -> bool:
    """Return whether a metric is an accuracy from 0 to 1, which a person reads in percent."""
    return "acc" in name.lower() and all(0 <= value <= 1 for value in values)


def value_of(name: str, value: float) -> str:
    """Return a metric as a person writes it.

    Example::

        >>> value_of("val_accuracy", 0.9109), value_of("val_loss", 0.27012)
        ('91.09%', '0.2701')
    """
    return f"{value:.2%}" if is_share(name, value) else f"{value:.4g}"


def difference_of(name: str, before: float, after: float) -> str:
    """Return how far a metric changed.

    Example::

        >>> difference_of("accuracy", 0.9, 0.885), difference_of("loss", 0.5, 0.75)
        ('-1.50 points', '+0.25')
    """
    return f"{100 * (after - before):+.2f} points" if is_share(name, before, after) else f"{after - before:+.4g}"


def count_of(count: int) -> str:
    """Return a number as a person says it, the exact one where it is short.

    Example::

        >>> count_of(75_002), count_of(29_433_856), count_of(7_062_000_000)
        ('75,002', '29.4 million', '7.06 billion')
    """
    if count >= 1e9:
        return f"{count / 1e9:,.2f} billion"
    return f"{count / 1e6:.1f} million" if count >= 1e7 else f"{count:,}"


def size_of(count: int) -> str:
    """Return a number of bytes, in the unit that leaves one to three digits before the point.

    Example::

        >>> size_of(910), size_of(110_160), size_of(3_180_470)
        ('910 bytes', '110.2 kB', '3.2 MB')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def is_noisy(facts: Facts) -> bool:
    """Return whether the times say nothing: runs differed too far."""
    return are_unsteady(facts.stages)


def time_of(milliseconds: float) -> str:
    """Return a time in digits that say something.

    Example::

        >>> time_of(0.01234), time_of(0.07), time_of(4.5611), time_of(1234.5)
        ('0.0123', '0.0700', '4.56', '1,234.50')
    """
    return f"{milliseconds:,.2f}" if milliseconds >= 1 else f"{milliseconds:#.3g}"


def speed(facts: Facts) -> int:
    """Return 1 if the network became faster, -1 if slower, 0 if neither is clear or the times are not known."""
    before, after = facts.before.milliseconds, facts.after.milliseconds
    margin = max(MARGIN, spread_of(facts.stages))
    if not before or not after or is_noisy(facts) or abs(after / before - 1) <= margin:
        return 0
    return 1 if after < before else -1


def _on_size(facts: Facts) -> str:
    allocation, before, after = facts.allocation, facts.before, facts.after
    told = f"{len(allocation.factorized)} of {len(allocation.layers)} layers are factorized"
    if before.parameters and after.parameters:
        kept = f"{after.parameters:,} of {before.parameters:,}"
        told += f": the network keeps {after.parameters / before.parameters:.1%} of its parameters ({kept})"
    else:
        told += f": the network keeps {allocation.cost / allocation.dense_cost:.1%} of its {spoken(allocation.unit)}"
    if before.file_bytes and after.file_bytes:
        told += f", and a file of its weights is {after.file_bytes / before.file_bytes:.1%} as large"
    return f"{told}."


def _on_time(facts: Facts) -> str:
    before, after = facts.before, facts.after
    if not before.milliseconds or not after.milliseconds:
        return ""
    times = f"{time_of(after.milliseconds)} ms in place of {time_of(before.milliseconds)} ms"
    found = speed(facts)
    if found > 0:
        return f"It is {before.milliseconds / after.milliseconds:.2f} times as fast: a batch takes {times}."
    if is_noisy(facts):
        return (
            f"Whether it is faster cannot be told: something else kept the device busy, and runs differ by "
            f"{spread_of(facts.stages):.0%} ({times} for a batch). Make the page again when nothing else runs."
        )
    if found == 0:
        return f"It is neither clearly faster nor clearly slower: a batch takes {times}."
    return f"It is smaller and slower: a batch takes {times}{_although(before, after)}."


def _although(before: Stage, after: Stage) -> str:
    """Say why fewer multiply-adds may take longer, and what to do."""
    if not 0 < after.multiply_adds < before.multiply_adds:
        return ", for two small layers stand in place of one"
    fewer = f"{after.multiply_adds / before.multiply_adds:.1%}"
    return (
        f", although it has {fewer} of the multiply-adds, for two small layers stand in place of one. If time is what "
        "counts, ask for it (`cost: latency`), or let `lr-callback tune` choose other forms of the layers"
    )


def _on_accuracy(facts: Facts) -> str:
    name = facts.accuracy
    if name is None:
        return ""
    before, after = facts.before.metrics[name], facts.after.metrics[name]
    change = after - before if is_share(name, before, after) else (after - before) / 100
    values = f"{value_of(name, before)} before, {value_of(name, after)} now"
    if abs(change) < _SAME:
        return f"{name} is the same: {values}."
    if change < 0:
        lost = difference_of(name, after, before).removeprefix("+")
        return f"{name} is lower by {lost}: {values}. More epochs after the cut, or a larger part kept, cost less."
    trained = " The rise is no gain of the compression: the dense network was measured before the cut, and training"
    return f"{name} is not lower: {values}.{trained} went on."
