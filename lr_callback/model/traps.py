"""Traps: modules that look like a layer of a known type and are more, or less, than that; each with its reason.

A reason is a text for the table of an allocation, and says what to do where something can be done. Classes of other
packages are known by name: they need not be installed, and some take long to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_type

COMPUTED = "its weight is computed from other parameters (weight_norm, pruning or another parametrization)"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_AROUND: Mapping[str, str] = {
    "BaseTunerLayer": "inside an adapter of peft, which merges into the weight in place; merge_and_unload() first",
    "ModulesToSaveWrapper": "one of peft's `modules_to_save`, whose weight it sets and saves; merge_and_unload() first",
    "ScriptModule": "inside a TorchScript module, which cannot be changed; compress first, then script or trace",
    "FullyShardedDataParallel": "inside FSDP, which holds its weight as a part of another; compress before wrapping",
    "MultiheadAttention": "read directly by nn.MultiheadAttention",
}
"""Class of a module -> why no layer inside it can be replaced; the first counts, peft has a class of the last name."""

_PACKED = ("WeightedQuantizedModule", "FullyShardedDataParallel")

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def around(module: nn.Module) -> str | None:
    """Return why nothing inside a module can be factorized, None if that is not so.

    Example::

        >>> around(nn.MultiheadAttention(4, 2)), around(nn.Sequential())
        ('read directly by nn.MultiheadAttention; split_attention_(model) makes layers of it', None)
    """
    names = {base.__name__ for base in type(module).__mro__}
    reason = next((reason for name, reason in _AROUND.items() if name in names), None)
    return reason if reason is None else reason + way_out(module)


def way_out(module: nn.Module) -> str:
    """Return what makes layers of the weights of a module, as the end of a reason; nothing if nothing does.

    Example::

        >>> way_out(nn.MultiheadAttention(4, 2)), way_out(nn.LSTM(4, 4))
        ('; split_attention_(model) makes layers of it', '')
    """
    return "; split_attention_(model) makes layers of it" if type(module) is nn.MultiheadAttention else ""


def holds_weight(module: nn.Module) -> bool:
    """Return whether a module without a matrix among its parameters has one elsewhere: packed, flat or a buffer."""
    packed = any(base.__name__ in _PACKED for base in type(module).__mro__)
    frozen = (name for name, buffer in module._buffers.items() if buffer is not None and buffer.dim() >= 2)
    return packed or any(name.endswith("weight") for name in frozen)


def layer_trap(layer: nn.Module) -> str | None:
    """Return what a dense layer has that a factorized one could not take over, None if there is nothing.

    Example::

        >>> layer = nn.Linear(4, 4)
        >>> layer.register_buffer("scale", torch.ones(()))
        >>> layer_trap(layer)
        'it holds more than a weight and a bias: scale'
    """
    known = ("weight",) if isinstance(layer, nn.Embedding) else ("weight", "bias")
    return more_than(layer, known, f"a {' and a '.join(known)}") or _bias_trap(layer, layer) or state_hooks(layer)


def more_than(module: nn.Module, known: Sequence[str], told: str) -> str | None:
    """Return what a module has besides the parameters and children that its type knows, None if there is nothing.

    Example::

        >>> more_than(nn.LayerNorm(4), ("weight",), "a weight")
        'it holds more than a weight: bias'
    """
    if "forward" in vars(module):
        return "its forward was replaced on the object itself, and would be lost"
    own = {**module._parameters, **module._buffers, **module._modules}
    more = [name for name in own if name not in known]
    return f"it holds more than {told}: {', '.join(more)}" if more else None


def state_hooks(module: nn.Module) -> str | None:
    """Return that a user's hooks on the state dict of a module would not find what they know, None without any.

    Example::

        >>> layer = nn.Linear(4, 4)
        >>> _ = layer.register_state_dict_pre_hook(print)
        >>> state_hooks(layer)
        'it has hooks on its state dict, which would not find its weight there any more'
    """
    if any(_is_own(hook) for hooks in _STATE_HOOKS for hook in getattr(module, hooks).values()):
        return "it has hooks on its state dict, which would not find its weight there any more"
    return None


def _bias_trap(layer: nn.Module, holder: nn.Module) -> str | None:
    """Return why the bias of a dense or factorized layer cannot come along, None if it can, or there is none."""
    kind, bias = layer_type(layer), getattr(holder, "bias", None)
    if kind is None or bias is None:
        return None
    out_channels = kind.geometry(layer).out_channels
    if isinstance(bias, nn.Parameter) and tuple(bias.shape) == (out_channels,):
        return None
    shape = f" of shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else ""
    return f"its bias is a {type(bias).__name__}{shape}, not an nn.Parameter of shape ({out_channels},)"


def _is_own(hook: object) -> bool:
    """Return whether a hook is the user's: torch leaves one behind where weight_norm was and was removed."""
    function = getattr(hook, "hook", hook)
    return not str(getattr(function, "__module__", "")).startswith("torch.nn.utils.")


def weight_trap(weight: Tensor) -> str | None:
    """Return why a weight cannot be replaced by its factors, None if it can.

    Example::

        >>> weight_trap(nn.Parameter(torch.ones(4, 1).expand(4, 4)))
        'its weight is expanded: several of its entries are one number in memory'
    """
    if any(base.__name__ == "DTensor" for base in type(weight).__mro__):
        return "its weight is sharded over processes (DTensor); compress before sharding"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain nn.Parameter; compress first"
    if weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if weight.dtype not in _DTYPES:
        return f"its weight is of dtype {weight.dtype}, not floating point of 16, 32 or 64 bits"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    if is_expanded(weight):
        return "its weight is expanded: several of its entries are one number in memory"
    if getattr(
        weight, "_post_accumulate_grad_hooks", None
    ):  # an optimizer's step, perhaps: the factors would not train
        return "its weight has hooks on its accumulated gradient, which its factors would not have; remove them first"
    return None


def is_expanded(value: Tensor) -> bool:
    """Return whether several entries of a tensor are one number in memory.

    Example::

        >>> is_expanded(torch.ones(4, 1).expand(4, 4)), is_expanded(torch.ones(4, 1))
        (True, False)
        >>> is_expanded(torch.ones(7).as_strided((4, 4), (1, 1)))
        True
    """
    if value.layout != torch.strided or not value.numel():
        return False
    axes = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1)
    reach = 0  # of the axes with smaller steps: where each step is beyond it, no two entries meet
    for stride, size in axes:
        if stride <= reach:
            return _meets_itself(axes)
        reach += stride * (size - 1)
    return False


def _meets_itself(axes: Sequence[tuple[int, int]]) -> bool:
    """Return whether two entries of a tensor with these steps and sizes are one, by its places in order."""
    places = torch.zeros(1, dtype=torch.int64)
    for stride, size in axes:
        places = (places[:, None] + stride * torch.arange(size)).flatten().sort().values
        if not bool(places.diff().all()):
            return True
    return False


def factor_trap(layer: FactorizedLayer) -> str | None:
    """Return why a factorized layer cannot be composed and factorized anew, None if it can.

    Example::

        >>> from lr_callback.layers import FactorizedLinear
        >>> layer = FactorizedLinear(nn.Linear(8, 8), num_slices=1, rank=2)
        >>> _ = nn.utils.parametrizations.weight_norm(layer.encoder)
        >>> factor_trap(layer)
        'the weight of its encoder is computed from other parameters; make it a plain parameter again'
    """
    for name, factor in (("encoder", layer.encoder), ("decoder", layer.decoder)):
        weight = factor._parameters.get("weight")
        if weight is None or is_parametrized(factor):
            return f"the weight of its {name} is computed from other parameters; make it a plain parameter again"
        reason = weight_trap(weight)
        if reason is not None:
            return f"{name}: {reason}"
    return _bias_trap(layer, layer.decoder)
