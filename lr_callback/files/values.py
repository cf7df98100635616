"""Values: a state dict loaded into a model that has its structure, all of it or nothing.

torch loads one entry after the other, and goes on past those that a module does not take. So what can be seen before is
refused before, and for all else the values of the model are noted and put back.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lr_callback.files.safetensors_file import is_composed, same_tensors
from lr_callback.model.holders import shared_memory
from lr_callback.model.traps import is_expanded


def check_has_values(
    model: nn.Module, what_to_do: str = "call `model.to_empty(device=...)` first. Nothing was changed."
) -> None:
    """Refuse a model on the meta device: what is loaded into it would be lost, and there is nothing to be written.

    Args:
        model: any module.
        what_to_do: the end of the text of the error.

    Raises:
        ValueError: If a parameter or buffer has no values.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, value in named if value.device.type == "meta"]
    if empty:
        raise ValueError(
            f"`model`: its weights must be on a device that holds values, found {len(empty)} on the meta device, the "
            f"first is {empty[0]}; {what_to_do}"
        )


def keep_values(model: nn.Module, undo: ExitStack) -> dict[str, Tensor]:
    """Note the values and the extra state of a model.

    Args:
        model: dense or factorized.
        undo: given what puts them back; a tensor or module that does not take its own is left out.

    Returns:
        Name -> parameter or buffer.

    Example::

        >>> model = nn.Linear(1, 1)
        >>> with ExitStack() as undo:
        ...     _ = keep_values(model, undo)
        ...     _ = nn.init.constant_(model.weight, 7.0)
        >>> bool(model.weight == 7)
        False
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = [value for value in named.values() if not is_lazy(value)]
    undo.callback(_put_back, held, [value.detach().clone() for value in held])
    extra = [one for one in model.modules() if type(one).get_extra_state is not nn.Module.get_extra_state]
    undo.callback(_put_back_extra, extra, [_copied(one.get_extra_state()) for one in extra])
    return named


def check_writable(entries: Mapping[str, Tensor]) -> None:
    """Refuse entries that torch would stop at.

    Args:
        entries: name -> parameter or buffer.

    Raises:
        ValueError: If one is expanded, of inference mode, or of a class that torch writes nothing plain into.
    """
    for name, value in entries.items():
        reason = _unwritable(value)
        if reason is not None:
            raise ValueError(
                f"`model`: {name} must be a tensor that can be written, found {reason}. Nothing was changed."
            )


def load_values(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, object]) -> None:
    """Load a state dict into a model; the caller undoes it if it raises.

    Args:
        model: of the structure of the state dict.
        state: name -> value, for all names of the model.
        versions: of its modules, as ``state_dict()`` notes them in ``_metadata``; those that lack are the model's.

    Raises:
        ValueError: If a module does not take its part, or two entries lie in the same memory and do not agree.
    """
    try:
        model.load_state_dict(_with_versions(model, state, versions))
    except RuntimeError as error:
        raise ValueError(f"`source`: the model does not take it: {error} Nothing was changed.") from error
    _check_overlaps(model, state)


def _check_overlaps(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse what was written over by another entry, which lies partly in the same memory."""
    others = shared_memory(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in others and not same_tensors({name: value}, {name: state[name].to(value.dtype)}):
            raise ValueError(
                f"`source`: {name} and {', '.join(others[id(value)])} must agree where they lie in the same memory in "
                "the model, found numbers that differ; one would be lost. Give the model tensors with memory of their "
                "own. Nothing was changed."
            )


def _unwritable(value: Tensor) -> str | None:
    """Return why nothing can be loaded into a tensor, and what to do, None if it can."""
    if is_lazy(value):
        return None
    if is_composed(value):
        return f"one of the class {type(value).__name__}; restore the model first, then quantize or shard it"
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return "one made under `torch.inference_mode()`; make the model outside of it, or restore inside it"
    if is_expanded(value):
        return "an expanded one, several entries of which are one number in memory; put a `.clone()` in its place"
    return None


def _with_versions(model: nn.Module, state: Mapping[str, Tensor], given: Mapping[str, object]) -> Mapping[str, Tensor]:
    """Give a state dict the versions of its modules: those of the source where it has them, or else the model's.

    Some modules load nothing without their version (torchvision's MNASNet). A plain dict of tensors has none; its names
    and shapes are those of the model as it is now.
    """
    versioned = OrderedDict(state)
    own = getattr(model.state_dict(), "_metadata", {})  # a module may give a plain dict
    vars(versioned)["_metadata"] = {**own, **given}
    return versioned


def _copied(extra: object) -> object:
    """Return a copy that later changes do not reach, the object itself where it has none."""
    with suppress(Exception):
        return copy.deepcopy(extra)
    return extra


@torch.no_grad()
def _put_back(held: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for value, former in zip(held, kept, strict=True):
        with suppress(Exception):  # what cannot be written now could not before, and is as it was
            value.copy_(former)


def _put_back_extra(modules: Sequence[nn.Module], kept: Sequence[object]) -> None:
    for module, former in zip(modules, kept, strict=True):
        with suppress(Exception):  # it may be the module that refused what was loaded
            module.set_extra_state(former)
