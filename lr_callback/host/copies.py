"""Copies: a run's module once more, which is in no Trainer."""

from __future__ import annotations

import copy

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

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
