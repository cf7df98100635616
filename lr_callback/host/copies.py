"""Copies: a run's module and its loaders once more, for what is done beside the run, which does not notice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""Methods that `torch.compile` of a LightningModule puts into its attributes."""


def copied_module(pl_module: LightningModule, what: str, way_out: str) -> LightningModule:
    """Return a copy of a module, with weights, buffers, metrics and attributes of its own, in no Trainer.

    Args:
        pl_module: is not changed.
        what: is done with the copy, for an error.
        way_out: what to do where that cannot be, likewise.

    Raises:
        MisconfigurationException: If it cannot be copied.
    """
    try:
        made = copy.deepcopy(pl_module, _hooks_of_others(pl_module))
    except Exception as error:
        raise MisconfigurationException(
            f"LowRankCompression: {what} of the module, and it could not be copied "
            f"({type(error).__name__}: {error}). Keep no intermediate tensors, files or loaders in attributes of the "
            f"module, so that copy.deepcopy(module) works, or {way_out}. Nothing was changed."
        ) from error
    # What is compiled is that of the module that was copied.
    for name in _COMPILED if getattr(made, "_compiler_ctx", None) else ():
        vars(made).pop(name, None)
    for module in made.modules():
        vars(module).pop("_compiled_call_impl", None)
    vars(made)["_metric_attributes"] = None  # by the identity of metrics, of which the copy has others
    return made


def _hooks_of_others(pl_module: LightningModule) -> dict[int, object]:
    """Return, for ``copy.deepcopy``, the hooks that stay the same objects: a hook may hold a whole Trainer."""
    own = set(pl_module.modules())
    hooks = [hook for module in own for name in _HOOKS for hook in vars(module).get(name, {}).values()]
    return {id(hook): hook for hook in hooks if getattr(hook, "__self__", None) not in own}


def surely_repeats(loader: CombinedLoader) -> bool:
    """Return whether going through some batches of a copy can take nothing from a run.

    A stream may go on where it was; a sampler that nobody here knows, likewise.
    """
    return all(isinstance(one, DataLoader) and _has_places(one) for one in loader.flattened)


def _has_places(loader: DataLoader[Any]) -> bool:
    """Return whether a loader takes samples by their places, and chooses these by samplers of torch or Lightning."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    own = [one for one in (loader.sampler, loader.batch_sampler, inner) if one is not None]
    known = {type(one).__module__.partition(".")[0] for one in own} <= {"torch", "lightning", "pytorch_lightning"}
    return known and not isinstance(loader.dataset, IterableDataset)


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
    if isinstance(loader, Iterator) or (isinstance(loader, IterableDataset) and iter(loader) is iter(loader)):
        raise MisconfigurationException(
            f"LowRankCompression: {what} once more, and a {type(loader).__name__} can be gone through only once. Give "
            f"the Trainer a loader that makes a new iterator each time. {way_out}"
        )
