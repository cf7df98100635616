"""Observe: run a model once without touching it, count its multiply-adds and see how each layer is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lr_callback.costs import Call
from lr_callback.find import find_layers
from lr_callback.layer_types import layer_type, saved_cost
from lr_callback.layers import FactorizedLayer


@dataclass(frozen=True)
class Observation:
    """What one run of a model showed.

    Args:
        dense_multiply_adds: of the model with all layers dense: what torch's flop counter counted, halved, and what
            factorized layers saved.
        calls: layer name -> its calls, in order.
    """

    dense_multiply_adds: int
    calls: Mapping[str, tuple[Call, ...]]

    def multiply_adds(self, model: nn.Module) -> int:
        """Return the multiply-adds of the model as it stands now, for the same run."""
        return self.dense_multiply_adds - saved_multiply_adds(model, self.calls)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists and numbers."""
        calls = {
            name: [[one.batch, list(one.inputs), list(one.outputs)] for one in of] for name, of in self.calls.items()
        }
        return {"dense_multiply_adds": self.dense_multiply_adds, "calls": calls}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Observation:
        """Read what :meth:`to_dict` wrote."""
        calls = {
            name: tuple(Call(batch, tuple(inputs), tuple(outputs)) for batch, inputs, outputs in of)
            for name, of in written["calls"].items()
        }
        return cls(written["dense_multiply_adds"], calls)


def saved_multiply_adds(model: nn.Module, calls: Mapping[str, tuple[Call, ...]]) -> int:
    """Return how many multiply-adds the factorized layers of a model save in the named calls."""
    layers = find_layers(model).layers
    return sum(
        saved_cost(layer, calls[name])
        for name, layer in layers.items()
        if isinstance(layer, FactorizedLayer) and name in calls
    )


def observe(model: nn.Module, example_input: object) -> Observation:
    """Run a model on an example, in eval mode and without gradients; leave it as it was.

    Args:
        model: any module.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of named ones.

    Raises:
        ValueError: If there is no example input.

    Example::

        >>> observe(nn.Linear(6, 5), torch.zeros(2, 6)).dense_multiply_adds
        60
    """
    if example_input is None:
        raise ValueError("`example_input`: multiply-adds are counted on an example input, got none; give a batch.")
    if isinstance(example_input, Mapping):
        return observe_run(model, lambda: model(**example_input))
    arguments = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
    return observe_run(model, lambda: model(*arguments))


def observe_run(model: nn.Module, run: Callable[[], object]) -> Observation:
    """Observe the layers of ``model`` while ``run`` calls it, or a part of it."""
    seen: dict[str, list[Call]] = {}
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        for name, layer in find_layers(model).layers.items():
            seen[name] = []
            handle = layer.register_forward_hook(_recorder(seen[name]), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_as_written())
        counter = stack.enter_context(FlopCounterMode(display=False))
        run()
    calls = {name: tuple(of) for name, of in seen.items()}
    return Observation(counter.get_total_flops() // 2 + saved_multiply_adds(model, calls), calls)


def _recorder(seen: list[Call]) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
    def record(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], outputs: Tensor) -> None:
        kind = layer_type(layer)
        assert kind is not None
        seen.append(kind.call(inputs[0] if inputs else named[kind.argument], outputs))

    return record


@contextmanager
def _as_written() -> Iterator[None]:
    """Run what is compiled as it is written: a compiled graph shows neither its layers nor, perhaps, its products."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; give back each module's mode and the random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused path of nn.TransformerEncoder hides its products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
