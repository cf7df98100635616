"""Filter pruning, to compare with: whole filters dropped by their norm, by the library torch-pruning."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lr_callback.common.example import Example

_STEPS = 200
"""Steps from all filters to one of each layer; the first at which the network is small enough is the last."""

_NORMS = {"l1": 1, "l2": 2}


def torch_pruning() -> ModuleType:
    """Import what only filter pruning needs when it is needed.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        return import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`filter_pruning`: torch-pruning must be installed, and it was not found; "
            "install it with: pip install 'lr_callback[pruning]'"
        ) from error


def prune_filters_(model: nn.Module, keep_ratio: float, network: nn.Module, example: Example, norm: str = "l2") -> None:
    """Drop the filters of the smallest norm, the same share of each group, until a model is small enough.

    Filters that must go together, as those of a shortcut, are one group; its norm is the mean over its layers. The
    outputs of the network stay. So do the filters whose outputs are padded by constants on their way: the library takes
    channels to keep their numbers there, and where channels are what is padded (the shortcuts of the CIFAR ResNets) it
    would drop others than those that belong together.

    Args:
        model: in place; its parameters are counted.
        keep_ratio: fraction of them to keep at most.
        network: the module inside of it, or itself, that is called.
        example: how it is called.
        norm: ``l1`` or ``l2``.

    Raises:
        ModuleNotFoundError: If torch-pruning is not installed.
        ValueError: If so few parameters cannot be reached; the model is not what it was then.

    Source: Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets" (arXiv 1608.08710), the same
    share in each layer; groups as in Fang et al., "DepGraph" (arXiv 2301.12900).
    """
    library = torch_pruning()
    dense = _parameters(model)
    call = _call(example)
    training = network.training
    network.eval()
    pruner = library.pruner.BasePruner(
        network,
        None,
        forward_fn=call,
        importance=library.importance.GroupMagnitudeImportance(p=_NORMS[norm]),
        pruning_ratio=1.0,
        iterative_steps=_STEPS,
        ignored_layers=kept_layers(library, network, call),
    )
    for _ in range(_STEPS):
        if _parameters(model) <= keep_ratio * dense:
            break
        pruner.step()
    network.train(training)
    if _parameters(model) > keep_ratio * dense:
        raise ValueError(
            f"filter pruning: `keep_ratio` must be at least {_parameters(model) / dense:.4f}, which one filter in each "
            f"layer that can be pruned leaves, got {keep_ratio}."
        )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _call(example: Example) -> Callable[[nn.Module, object], object]:
    """Return what calls a network as in the example, of which no tensor is one of inference mode."""
    arguments, named = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, vars(example)).values()
    return lambda network, _: network(*arguments, **named)


def kept_layers(
    library: ModuleType, network: nn.Module, call: Callable[[nn.Module, object], object]
) -> list[nn.Module]:
    """Return the layers whose filters stay: those of the network's outputs, and those that are padded by constants."""
    graph = library.DependencyGraph().build_dependency(network, None, forward_fn=call)
    kept: list[nn.Module] = []
    for group in graph.get_all_groups():
        parts = [item.dep for item in group]
        padded = any("ConstantPad" in str(part.target) for part in parts)
        taken = any(graph.is_in_channel_pruning_fn(part.handler) for part in parts)
        if padded or not taken:
            kept += [part.target.module for part in parts if graph.is_out_channel_pruning_fn(part.handler)]
    return kept
