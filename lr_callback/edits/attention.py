"""Attention: each nn.MultiheadAttention becomes layers that can be factorized, before a training begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from lr_callback.edits.attached import copy_attributes, not_copied
from lr_callback.edits.build import hand_over
from lr_callback.edits.surgery import keep_places
from lr_callback.layers.attention import SplitAttention
from lr_callback.model.find import insides
from lr_callback.model.holders import held_elsewhere, owners_of_parameters, shared_memory
from lr_callback.model.traps import more_than, state_hooks

_DIVIDED = ("in_proj_weight", "in_proj_bias")
_WHOLE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")


def split_attention_(model: nn.Module) -> tuple[str, ...]:
    """Replace every ``nn.MultiheadAttention`` by a :class:`~lr_callback.SplitAttention`, in place.

    ``nn.MultiheadAttention`` reads its weights without calling a layer, so that nothing can stand in their place. What
    takes its place computes the same from four ``nn.Linear``, which are layers like all others for
    :class:`~lr_callback.LowRankCompression`, :func:`~lr_callback.allocate` and :func:`~lr_callback.factorize_`.

    Call it in the ``__init__`` of a LightningModule, after weights are loaded: before an optimizer is made, which
    would go on with the old weights, and before the model is compiled or wrapped. The names in state dicts change,
    from ``in_proj_weight`` to ``q_proj.weight``, ``k_proj.weight`` and ``v_proj.weight``; ``out_proj`` keeps its names.

    Values, dtype, device, ``requires_grad``, mode, forward and backward hooks, and what users set on a module or its
    weights are taken over; a module at several places stays one. Subclasses of ``nn.MultiheadAttention`` are left as
    they are, quantizable ones too: nobody knows what they do besides.

    Args:
        model: that holds the attention.

    Returns:
        The names of the modules that were replaced, of one at several places the first.

    Raises:
        ValueError: If the model itself is an ``nn.MultiheadAttention``, or one holds or is held by what could not be
            taken over. Nothing was changed.

    Example::

        >>> from lr_callback.model.find import find_layers
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> split_attention_(model)
        ('self_attn',)
        >>> list(find_layers(model).layers)[:4]
        ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'self_attn.out_proj']
    """
    found = {name: one for name, one in model.named_modules() if _is_plain_attention(one)}
    if "" in found:
        raise ValueError(
            "`model` is an nn.MultiheadAttention itself, not one that holds it; take `SplitAttention(model)`."
        )
    if not found:
        return ()
    for name, reason in _refusals(model, found):
        raise ValueError(
            f"{name}: it cannot be split, {reason}. Nothing was changed; for the others alone call `split_attention_` "
            "on the modules that hold them."
        )
    _swap(model, {attention: _split(attention) for attention in found.values()})
    return tuple(found)


def _is_plain_attention(module: nn.Module) -> bool:
    """Return whether a module is of the class itself; a parametrization makes a subclass of its own."""
    kind = type(module)
    return (kind.__bases__[0] if is_parametrized(module) else kind) is nn.MultiheadAttention


def _split(attention: nn.MultiheadAttention) -> SplitAttention:
    with torch.inference_mode(False):
        made = SplitAttention(attention)
    for name, ending in zip(_DIVIDED, ("weight", "bias"), strict=True):
        old = attention._parameters[name]
        if old is not None:
            copy_attributes(old, [made.get_parameter(f"{part}_proj.{ending}") for part in "qkv"])
    hand_over(attention, made)
    hand_over(attention.out_proj, made.out_proj)
    return made


def _swap(model: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    with ExitStack() as undo:
        keep_places(model, undo)
        for parent in list(model.modules()):
            for child, module in parent._modules.items():
                if module in made:
                    parent._modules[child] = made[module]
        undo.pop_all()


def _refusals(model: nn.Module, found: dict[str, nn.MultiheadAttention]) -> Iterator[tuple[str, str]]:
    """Yield the names of what cannot be replaced without losing something, with reasons."""
    inside = insides(model)
    own = {name: inside.get(one) or _own_refusal(name, one) for name, one in found.items()}
    yield from ((name, reason) for name, reason in own.items() if reason is not None)
    divided = {(name, weight): one for name, module in found.items() for weight, one in _divided(module).items()}
    elsewhere = held_elsewhere(model, [*found.values(), *divided.values()])
    for name, module in found.items():
        if id(module) in elsewhere:
            place = elsewhere[id(module)]
            yield name, f"held by {place} too, which would keep it as it is now; hold it as a submodule only"
    owners, memory = owners_of_parameters(model), shared_memory(model)
    for (name, weight), one in divided.items():
        others = [*(owner for owner in owners[id(one)] if owner != name), *memory.get(id(one), ())]
        others += [elsewhere[id(one)]] if id(one) in elsewhere else []
        reason = _weight_refusal(weight, one, others)
        if reason is not None:
            yield name, reason


def _divided(attention: nn.MultiheadAttention) -> dict[str, nn.Parameter]:
    """Return the parameters that are copied in parts; all others stay the same ones."""
    held = {name: attention._parameters.get(name) for name in _DIVIDED}
    return {name: one for name, one in held.items() if one is not None}


def _own_refusal(name: str, attention: nn.MultiheadAttention) -> str | None:
    outputs = attention._modules.get("out_proj")
    if attention._compiled_call_impl is not None or name.rpartition(".")[2] == "_orig_mod":
        return "it is compiled on its own, and would go on being called; compile the module that holds it instead"
    if is_parametrized(attention) or (outputs is not None and is_parametrized(outputs)):
        return "a weight of it is computed by a parametrization; make it a plain parameter first"
    if type(outputs) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"its out_proj is a {type(outputs).__name__}, which may do more than an nn.Linear does"
    assert isinstance(outputs, nn.Linear)
    own = more_than(attention, (*_DIVIDED, *_WHOLE, "out_proj"), "its own weights") or state_hooks(attention)
    of_outputs = more_than(outputs, ("weight", "bias"), "a weight and a bias") or state_hooks(outputs)
    return own or (f"of its out_proj: {of_outputs}" if of_outputs is not None else None)


def _weight_refusal(name: str, parameter: nn.Parameter, others: list[str]) -> str | None:
    """Return why a parameter cannot be copied in parts, None if it can."""
    if others:
        return f"its {name} is also that of {', '.join(others)}, and three parts cannot be"
    if type(parameter) is not nn.Parameter:
        return f"its {name} is a {type(parameter).__name__}, not a plain nn.Parameter"
    if parameter.grad is not None:
        return f"its {name} has a gradient; split before the training, or set it to None with zero_grad()"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return f"its {name} has hooks on its gradient, which would be left behind; register them afterwards"
    left = not_copied(parameter)
    return f"its {name} has attributes that cannot be copied: {', '.join(left)}; set them afterwards" if left else None
