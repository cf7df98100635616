"""Hook: a module takes the structure of any state dict that is about to be loaded into it.

Not while it is trained: its optimizers would go on with the parameters of layers that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from weakref import WeakSet

from torch import Tensor, nn

from lr_callback.checkpoint import check_weights, restructured
from lr_callback.surgery import replace_layers

Model = TypeVar("Model", bound=nn.Module)

_HELD: WeakSet[nn.Module] = WeakSet()
"""Modules in training, whose optimizers hold the parameters of the layers as they are; a copy is not one of them."""


def structure_hook(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: object,
    unexpected_keys: object,
    error_msgs: object,
) -> None:
    """Adapt a module's structure to a state dict that is about to be loaded.

    For ``module.register_load_state_dict_pre_hook``. A function of this file, so that copies of the module and spawned
    processes can hold it.
    """
    made = restructured(module, state_dict, prefix)
    if made and not prefix:
        # Torch would find out after the layers were replaced. Whether a name may be missing only torch knows: `strict`
        # is True here even if it was called with False.
        check_weights(module, state_dict, partial=True)
    if made and module in _HELD and getattr(module, "_current_fx_name", None) != "on_train_end":
        raise ValueError(_refusal(list(made)))
    if made:
        replace_layers(module, made)


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

        >>> from lr_callback.analysis import allocate
        >>> from lr_callback.surgery import factorize_
        >>> trained = nn.Sequential(nn.Linear(64, 64))
        >>> _ = factorize_(trained, allocate(trained, keep_ratio=0.5))
        >>> prepare(nn.Sequential(nn.Linear(64, 64))).load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    install_hook(model)
    return model
