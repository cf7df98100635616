"""Loaders: a run's loaders, gone through once more beside the run, which does not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader


def copied_loader(loader: CombinedLoader, stack: ExitStack, what: str, way_out: str) -> CombinedLoader:
    """Return a copy of a loader, with iterators of its own; it has the same datasets and samplers.

    Args:
        loader: of a run, of either package of Lightning.
        stack: given what puts generators that are shared back.
        what: goes through it, for an error.
        way_out: what to do where that cannot be, likewise.

    Raises:
        MisconfigurationException: If it can be gone through only once.
    """
    copied = type(loader)(loader.iterables, loader._mode)  # a Trainer looks for its own package's class
    copied.flattened = [_copy(one, stack, what, way_out) for one in loader.flattened]
    copied.limits = loader.limits
    return copied


def _copy(loader: object, stack: ExitStack, what: str, way_out: str) -> object:
    """Return a loader with an iterator of its own; generators that it shares are put back in the end."""
    if isinstance(loader, DataLoader):
        if not loader.num_workers:  # a worker goes through a copy
            _check_repeats(loader.dataset, what, way_out)
        for holder in (loader, loader.sampler):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                stack.callback(generator.set_state, generator.get_state())
        made = copy.copy(loader)
        vars(made)["_iterator"] = None  # persistent workers of the run's loader are its own
        return made
    _check_repeats(loader, what, way_out)
    return loader


def _check_repeats(loader: object, what: str, way_out: str) -> None:
    if isinstance(loader, Iterator):
        raise MisconfigurationException(
            f"LowRankCompression: {what} once more, and a {type(loader).__name__} can be gone through only once. Give "
            f"the Trainer a loader that makes a new iterator each time. {way_out}"
        )
