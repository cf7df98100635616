"""Hook: a module takes the structure of any state dict that is about to be loaded into it.

Not while it is trained: its optimizers would go on with the parameters of layers that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar
from weakref import WeakSet

from torch import Tensor, nn

from lr_callback.edits.surgery import replace_layers
from lr_callback.files.checkpoint import check_weights, restructured
from lr_callback.files.names import ENTRIES
from lr_callback.files.source import check_values
from lr_callback.files.values import check_writable
from lr_callback.layers import dense_bias
from lr_callback.layers.base import any_weight
from lr_callback.model.find import find_layers

Model = TypeVar("Model", bound=nn.Module)

_FACTORS = (".encoder.weight", ".decoder.weight")

_HELD: WeakSet[nn.Module] = WeakSet()
"""Modules in training, whose optimizers hold the parameters of the layers as they are; a copy is not one of them."""


def structure_hook(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: Mapping[str, object],
    strict: bool,
    missing_keys: object,
    unexpected_keys: object,
    error_msgs: object,
) -> None:
    """Adapt a module's structure to a state dict that is about to be loaded.

    For ``module.register_load_state_dict_pre_hook``. A function of this file, so that copies of the module and spawned
    processes can hold it.

    Raises:
        ValueError: If the state dict has layers that the module cannot take, or another structure while it is trained.
            Nothing in it was changed; of a larger one that holds it, torch may have loaded other parts before.
    """
    state = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    try:
        _adapt(module, state, assign=bool(local_metadata.get("assign_to_params_buffers")))
    except ValueError as error:
        if not prefix:
            raise
        text = str(error).replace("Nothing was changed", "Nothing in it was changed")
        raise ValueError(f"{prefix.removesuffix('.')}: {text}") from error


def _adapt(module: nn.Module, state: Mapping[str, Tensor], assign: bool) -> None:
    """Give a module the structure of a state dict, or refuse it as :func:`~lr_callback.restore_` does.

    Torch would find out after the layers were replaced. Two things are left to it: layers whose structure stays; and
    names that are missing, of which only torch knows whether they may: a hook gets `strict` as True in any case.
    """
    made = restructured(module, state, "")
    _check_factors(module, state, made)
    if not made:
        return
    check_weights(module, state, partial=True)
    layers = {name: module.get_submodule(name) for name in made}
    if not assign:  # what is assigned need not become what was there
        own = {f"{name}.{inner}": any_weight(layer) for name, layer in layers.items() for inner in ENTRIES}
        check_values(own, {name: value for name, value in state.items() if name in own})
        biases = ((f"{name}.bias", dense_bias(layer)) for name, layer in layers.items())
        check_writable({name: bias for name, bias in biases if bias is not None})
    if module in _HELD and getattr(module, "_current_fx_name", None) != "on_train_end":
        raise ValueError(_refusal(list(made)))
    replace_layers(module, made)


def _check_factors(module: nn.Module, state: Mapping[str, Tensor], made: Collection[str]) -> None:
    """Refuse factors of a layer that would stay dense: torch passes them over where names may be missing."""
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name in (name for name in state if name.endswith(_FACTORS) and name not in own):
        layer = name.rpartition(".")[0].rpartition(".")[0]
        if layer not in made and f"{layer}.weight" in own and f"{layer}.weight" not in state:
            reason = find_layers(module).skipped.get(layer, "the other factor is missing")
            raise ValueError(
                f"{layer}: the state dict must have it as it can be in the model, found {name}, and it can only be "
                f"dense here: {reason}. Nothing was changed."
            )


def hold_structure(module: nn.Module) -> None:
    """Refuse state dicts of another structure for a module with the hook, until it is released."""
    _HELD.add(module)


def release_structure(module: nn.Module) -> None:
    """Let a module adapt its structure again."""
    _HELD.discard(module)


def _refusal(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        "load_state_dict: in the middle of a training the state dict must have the structure that the model has, it is "
        f"factorized otherwise at {', '.join(names[:4])}{more}. The optimizers would go on with parameters that the "
        "model no longer has. Load it before or after the training, or resume from its checkpoint: "
        "`trainer.fit(model, ckpt_path=...)`. Nothing was changed."
    )


def install_hook(module: nn.Module) -> None:
    """Let a module adapt its structure whenever a state dict is loaded into it; once, however often it is called."""
    if not has_hook(module):
        register: Callable[[Callable[..., None]], object] = module.register_load_state_dict_pre_hook
        register(structure_hook)


def has_hook(module: nn.Module) -> bool:
    """Return whether a module adapts its structure to a state dict that is loaded into it."""
    return any(getattr(hook, "hook", hook) is structure_hook for hook in module._load_state_dict_pre_hooks.values())


def prepare(model: Model) -> Model:
    """Let a model take the structure of any state dict that is loaded into it; call it before ``trainer.fit``.

    Needed where Lightning trains in child processes (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``) and loads the
    result into the model of the process that called it; elsewhere the callback does it.

    Args:
        model: dense or factorized.

    Returns:
        The same model.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> from lr_callback.edits.surgery import factorize_
        >>> trained = nn.Sequential(nn.Linear(64, 64))
        >>> _ = factorize_(trained, allocate(trained, keep_ratio=0.5))
        >>> prepare(nn.Sequential(nn.Linear(64, 64))).load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    install_hook(model)
    return model
