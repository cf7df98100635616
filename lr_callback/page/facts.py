"""Facts: all that a page says, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lr_callback.decisions.allocation import Allocation
from lr_callback.observation.report import Stage


@dataclass(frozen=True)
class Picture:
    """A figure in the page.

    Args:
        title: of the figure.
        caption: how it is to be read.
        svg: an ``<svg>`` element that stands for itself.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Missing:
    """What a page could say and does not.

    Args:
        what: is missing.
        why: that is.
        way: to have it; code stands between backquotes.

    Example::

        >>> str(Missing("figures", "matplotlib is not installed", "`pip install matplotlib`"))
        'without figures: matplotlib is not installed. To have them: `pip install matplotlib`'
    """

    what: str
    why: str
    way: str

    def __str__(self) -> str:
        """Return it as a line for a terminal."""
        return f"without {self.what}: {self.why.rstrip('.')}. To have them: {self.way}"


@dataclass(frozen=True)
class Facts:
    """All that a page says.

    Args:
        name: path of the checkpoint.
        allocation: of the latest compression.
        stages: the network before, and at later moments, the last one being that of the checkpoint; a number of 0 was
            not measured.
        batch: what the times and multiply-adds are of; empty: neither was measured.
        origin: how it was made: name -> value.
        arguments: of the callback, as YAML; empty: they are not known.
        loading: Python that gives the network.
        commands: what can be done next -> the command line.
        pictures: figures.
        missing: what the page lacks.
    """

    name: str
    allocation: Allocation
    stages: tuple[Stage, ...]
    batch: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    arguments: str = ""
    loading: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    missing: tuple[Missing, ...] = ()

    @property
    def before(self) -> Stage:
        """The network before the compression."""
        return self.stages[0]

    @property
    def after(self) -> Stage:
        """The network in the checkpoint."""
        return self.stages[-1]

    @property
    def accuracy(self) -> str | None:
        """Name of the metric that is an accuracy, among those that were measured before and after; None if none is."""
        both = [name for name in self.before.metrics if name in self.after.metrics]
        return next((name for name in both if "acc" in name.lower()), None)
