"""Observe: run a model once without touching it, count its multiply-adds and see how each layer is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lr_callback.costs import Call
from lr_callback.find import find_layers, replaceable_in
from lr_callback.latency import Latencies, LayerInput, Progress, measure
from lr_callback.layer_types import layer_type, saved_cost
from lr_callback.layers import FactorizedLayer
from lr_callback.methods import Method

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_KEPT = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATING})
"""Dtypes of buffers that a model writes; torch cannot copy or compare all others."""


@dataclass(frozen=True)
class Observation:
    """What one run of a model showed.

    Args:
        dense_multiply_adds: of the model with all layers dense: what torch's flop counter counted, halved, and what
            factorized layers saved.
        calls: layer name -> its calls, in order.
        reads: layer name -> how often the model took its weight without calling it, where it did: a factorized layer
            multiplies its factors each time, and what is done with their product costs as much as before.
        latencies: what layers and model take; None: they were not timed.
    """

    dense_multiply_adds: int
    calls: Mapping[str, tuple[Call, ...]]
    reads: Mapping[str, int] = field(default_factory=dict)
    latencies: Latencies | None = None

    def multiply_adds(self, model: nn.Module) -> int:
        """Return the multiply-adds of the model as it stands now, for the same run."""
        spent = composed_multiply_adds(model, self.reads)
        return self.dense_multiply_adds - saved_multiply_adds(model, self.calls) + spent

    def why_not(self, name: str) -> str | None:
        """Return why a layer saves no multiply-adds however it is factorized, None if it can."""
        if self.reads.get(name):
            return "its weight is read directly, not only by its forward: there it saves no multiply-adds"
        return None if self.calls.get(name) else "its forward is not called on the example input"

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists and numbers."""
        calls = {
            name: [[one.batch, list(one.inputs), list(one.outputs)] for one in of] for name, of in self.calls.items()
        }
        counted = {"dense_multiply_adds": self.dense_multiply_adds, "calls": calls, "reads": dict(self.reads)}
        return counted if self.latencies is None else {**counted, "latencies": self.latencies.to_dict()}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Observation:
        """Read what :meth:`to_dict` wrote."""
        calls = {
            name: tuple(Call(batch, tuple(inputs), tuple(outputs)) for batch, inputs, outputs in of)
            for name, of in written["calls"].items()
        }
        times = written.get("latencies")
        latencies = None if times is None else Latencies.from_dict(times)
        return cls(written["dense_multiply_adds"], calls, dict(written.get("reads", {})), latencies)


def saved_multiply_adds(model: nn.Module, calls: Mapping[str, tuple[Call, ...]]) -> int:
    """Return how many multiply-adds the factorized layers of a model save in the named calls."""
    layers = replaceable_in(model)
    return sum(saved_cost(layer, calls[name]) for name, layer in layers.items() if name in calls)


def composed_multiply_adds(model: nn.Module, reads: Mapping[str, int]) -> int:
    """Return how many multiply-adds it takes to compose the weights of factorized layers as often as they are read."""
    layers = replaceable_in(model) if reads else {}
    return sum(_to_compose(layer) * reads[name] for name, layer in layers.items() if name in reads)


def _to_compose(layer: FactorizedLayer) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _ = layer.weight
    return int(counter.get_total_flops()) // 2


def observe(
    model: nn.Module, example_input: object, timed_for: Method | None = None, progress: Progress | None = None
) -> Observation:
    """Run a model on an example, in eval mode and without gradients; leave it as it was.

    Args:
        model: any module.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of named ones.
        timed_for: the method among whose forms it is to choose by time; None: nothing is timed.
        progress: told of each layer that is timed.

    Raises:
        ValueError: If there is no example input, nothing to time, or times in a file are of another device.
        RuntimeError: If the clock is too noisy to time anything.

    Example::

        >>> observe(nn.Linear(6, 5), torch.zeros(2, 6)).dense_multiply_adds
        60
    """
    return observe_run(model, _call_of(model, example_input), timed_for, progress)


def _call_of(model: nn.Module, example_input: object) -> Callable[[], object]:
    if example_input is None:
        raise ValueError(
            "`example_input`: multiply-adds and latency are of a run on an example input, got none; give a batch."
        )
    if isinstance(example_input, Mapping):
        return lambda: model(**example_input)
    arguments = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
    return lambda: model(*arguments)


def observe_run(
    model: nn.Module, run: Callable[[], object], timed_for: Method | None = None, progress: Progress | None = None
) -> Observation:
    """Observe the layers of ``model`` while ``run`` calls it, or a part of it; see :func:`observe`."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        watched = {name: _Watched(layer, stack) for name, layer in find_layers(model).layers.items()}
        stack.enter_context(as_written())
        counter = stack.enter_context(FlopCounterMode(display=False))
        run()
    calls = {name: tuple(one.calls) for name, one in watched.items()}
    reads = {name: one.reads for name, one in watched.items() if one.reads}
    dense = counter.get_total_flops() // 2 + saved_multiply_adds(model, calls) - composed_multiply_adds(model, reads)
    inputs = {name: one.inputs for name, one in watched.items() if one.inputs}
    return Observation(
        dense, calls, reads, None if timed_for is None else _timed(model, run, inputs, timed_for, progress)
    )


def inputs_of_layers(model: nn.Module, run: Callable[[], object]) -> dict[str, tuple[LayerInput, ...]]:
    """Return what each layer of ``model`` is called with while ``run`` calls it, in order; see :func:`observe`."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        watched = {name: _Watched(layer, stack) for name, layer in find_layers(model).layers.items()}
        stack.enter_context(as_written())
        run()
    return {name: tuple(one.inputs) for name, one in watched.items()}


def _timed(
    model: nn.Module,
    run: Callable[[], object],
    inputs: Mapping[str, Sequence[LayerInput]],
    method: Method,
    progress: Progress | None,
) -> Latencies:
    """Time a run of a model, and each of the layers that it calls in the forms that a method may choose."""
    layers = {name: layer for name, layer in find_layers(model).layers.items() if name in inputs}
    if not layers:
        raise ValueError("cost='latency': the run must call a layer that can be factorized, and it calls none.")
    with untouched(model), as_written():
        return measure(layers, inputs, run, method, progress)


class _Watched:
    """The calls of a layer, and how often its weight is taken between them.

    Args:
        layer: dense or factorized.
        stack: given what ends the watch.
    """

    def __init__(self, layer: nn.Module, stack: ExitStack) -> None:
        self.calls: list[Call] = []
        self.inputs: list[LayerInput] = []
        self.reads = 0
        self._depth = 0
        stack.callback(layer.register_forward_pre_hook(self._enter).remove)
        leave = layer.register_forward_hook(self._leave, with_kwargs=True, prepend=True)
        stack.callback(leave.remove)
        holder = layer.encoder if isinstance(layer, FactorizedLayer) else layer
        parameters = holder._parameters
        watched = _Parameters(parameters, self._read)
        vars(holder)["_parameters"] = watched
        stack.callback(_give_back, holder, parameters, watched)

    def _enter(self, layer: nn.Module, inputs: object) -> None:
        self._depth += 1

    def _leave(self, layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], outputs: Tensor) -> None:
        self._depth -= 1
        kind = layer_type(layer)
        assert kind is not None
        given = inputs[0] if inputs else named[kind.argument]
        self.calls.append(kind.call(given, outputs))
        self.inputs.append(LayerInput.of(given))

    def _read(self) -> None:
        self.reads += not self._depth


class _Parameters(dict[str, nn.Parameter | None]):
    """A module's parameters, which tell when the weight is taken by name, as ``module.weight`` does."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], read: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._read = read

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if name == "weight":
            self._read()
        return super().__getitem__(name)


def _give_back(
    holder: nn.Module, parameters: dict[str, nn.Parameter | None], watched: Mapping[str, nn.Parameter | None]
) -> None:
    parameters.clear()
    parameters.update(watched)
    vars(holder)["_parameters"] = parameters


@contextmanager
def as_written() -> Iterator[None]:
    """Run what is compiled as it is written: a compiled graph shows neither its layers nor, perhaps, its products."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        yield


def putting_back(values: Iterable[Tensor]) -> Callable[[], None]:
    """Return what gives tensors the values again that they have now, in place."""
    kept = [(value, value.detach().clone()) for value in values]

    @torch.no_grad()
    def put_back() -> None:
        for value, former in kept:
            value.copy_(former)

    return put_back


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that are written in between: some models count their calls in one, in eval mode too.

    One that another shape takes the place of is a cache, which other attributes of its module describe, and stays.
    """
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if type(buffer) is Tensor and buffer.dtype in _KEPT and buffer.layout == torch.strided and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            _put_back(module, name, buffer, before)


@torch.no_grad()
def _put_back(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    # Versions do not tell: batch_norm writes its running statistics without a new one.
    if buffer.shape == before.shape and not buffer.is_inference() and not torch.equal(buffer, before):
        buffer.copy_(before)
    now = dict(module._buffers.items()).get(name)  # TorchScript's is no dict
    if now is None or now is buffer or (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
        return
    module._buffers[name] = buffer


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; give back modes, buffers and the random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused path of nn.TransformerEncoder hides its products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(), kept_buffers(model):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
