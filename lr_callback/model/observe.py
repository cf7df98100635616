"""Observe: run a model once without touching it, count its multiply-adds and see how each layer is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lr_callback.common.untouched import as_written, in_training, untouched
from lr_callback.decisions.costs import Call
from lr_callback.decisions.methods import Method
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_type, saved_cost
from lr_callback.model.find import find_layers, replaceable_in
from lr_callback.model.running import check_can_run, told
from lr_callback.units.activations import Activations, count_kept
from lr_callback.units.latency import Latencies, LayerInput, Progress, Wanted, measure

Timed: TypeAlias = Method | Mapping[str, Wanted]
"""What is to be known of the times of all layers, or of each by its name."""


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
        activations: what is kept for the backward pass; None: it was not counted.
    """

    dense_multiply_adds: int
    calls: Mapping[str, tuple[Call, ...]]
    reads: Mapping[str, int] = field(default_factory=dict)
    latencies: Latencies | None = None
    activations: Activations | None = None

    def multiply_adds(self, model: nn.Module) -> int:
        """Return the multiply-adds of the model as it stands now, for the same run."""
        spent = composed_multiply_adds(model, self.reads)
        return self.dense_multiply_adds - saved_multiply_adds(model, self.calls) + spent

    def is_used(self, name: str) -> bool:
        """Return whether the run called a layer, or read its weight."""
        return bool(self.calls.get(name) or self.reads.get(name))

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
        more = {"latencies": self.latencies, "activations": self.activations}
        return {**counted, **{name: one.to_dict() for name, one in more.items() if one is not None}}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Observation:
        """Read what :meth:`to_dict` wrote."""
        calls = {
            name: tuple(Call(batch, tuple(inputs), tuple(outputs)) for batch, inputs, outputs in of)
            for name, of in written["calls"].items()
        }
        times = written.get("latencies")
        latencies = None if times is None else Latencies.from_dict(times)
        kept = written.get("activations")
        activations = None if kept is None else Activations.from_dict(kept)
        return cls(written["dense_multiply_adds"], calls, dict(written.get("reads", {})), latencies, activations)


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
    model: nn.Module,
    example_input: object,
    timed_for: Timed | None = None,
    progress: Progress | None = None,
    activations: bool = False,
    named: str = "example_input",
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Observation:
    """Run a model on an example, in eval mode and without gradients; leave it as it was.

    Args:
        model: any module.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of named ones.
        timed_for: the method among whose forms it is to choose by time, for all layers or by name; None: nothing is
            timed.
        progress: told of each layer that is timed.
        activations: whether to run it once more, as it is trained, and count what is kept for the backward pass.
        named: how the caller calls the example, for the text of an error.
        within: makes what each run is made in, such as autocast.

    Raises:
        ValueError: If there is no example input, the model cannot be run on it, there is nothing to time, or times in a
            file are of another device.
        RuntimeError: If the clock is too noisy to time anything.

    Example::

        >>> observe(nn.Linear(6, 5), torch.zeros(2, 6)).dense_multiply_adds
        60
    """
    run = run_on(model, example_input, named, within)
    return observe_run(model, run, timed_for, progress, (example_input,) * activations)


def run_on(
    model: nn.Module,
    example_input: object,
    named: str = "example_input",
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], object]:
    """Return a run of a model on an example, which says where it fails; for the arguments see :func:`observe`.

    Raises:
        ValueError: If the model has no values, or there is no example; when it is called, if the model raises anything.
    """
    check_can_run(model)
    way_out = "give what its forward takes, or keep parameters or bytes, which need no run"
    call = _call_of(model, example_input)

    def inside() -> object:
        with within():
            return call()

    return told(model, inside, f"`{named}`: {type(model).__name__} must run on it", way_out)


def _call_of(model: nn.Module, example_input: object) -> Callable[[], object]:
    if example_input is None:
        raise ValueError(
            "`example_input`: multiply-adds, latency and activation memory are of a run on an example input, got none; "
            "give a batch."
        )
    if isinstance(example_input, Mapping):
        return lambda: model(**example_input)
    arguments = example_input if isinstance(example_input, (tuple, list)) else (example_input,)
    return lambda: model(*arguments)


def observe_run(
    model: nn.Module,
    run: Callable[[], object],
    timed_for: Timed | None = None,
    progress: Progress | None = None,
    given: Sequence[object] = (),
) -> Observation:
    """Observe the layers of ``model`` while ``run`` calls it, or a part of it; see :func:`observe`.

    Args:
        model: that is observed.
        run: calls it.
        timed_for: see :func:`observe`.
        progress: see :func:`observe`.
        given: the arguments of the calls; where there are some, what is kept for the backward pass is counted.
    """
    seen, inputs = observe_inputs(model, run)
    timed = None if timed_for is None else _timed(model, run, inputs, timed_for, progress)
    return replace(seen, latencies=timed, activations=_kept(model, run, given) if given else None)


def observe_inputs(
    model: nn.Module, run: Callable[[], object]
) -> tuple[Observation, dict[str, tuple[LayerInput, ...]]]:
    """Observe the layers of ``model`` while ``run`` calls it; return that, and what each is called with, in order."""
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        watched = {name: _Watched(layer, stack) for name, layer in find_layers(model).layers.items()}
        stack.enter_context(as_written())
        counter = stack.enter_context(FlopCounterMode(display=False))
        run()
    calls = {name: tuple(one.calls) for name, one in watched.items()}
    reads = {name: one.reads for name, one in watched.items() if one.reads}
    dense = counter.get_total_flops() // 2 + saved_multiply_adds(model, calls) - composed_multiply_adds(model, reads)
    return Observation(dense, calls, reads), {name: tuple(one.inputs) for name, one in watched.items()}


def _kept(model: nn.Module, run: Callable[[], object], given: Sequence[object]) -> Activations:
    """Count what a run in training keeps for its backward pass."""
    with in_training(model), as_written():
        return count_kept(model, find_layers(model).layers, run, given)


def _timed(
    model: nn.Module,
    run: Callable[[], object],
    inputs: Mapping[str, Sequence[LayerInput]],
    timed_for: Timed,
    progress: Progress | None,
) -> Latencies:
    """Time a run of a model, and each of the layers that it calls in the forms that they may have.

    A layer that is not to be factorized, and is not so far, is a part of the rest.
    """
    found = {name: layer for name, layer in find_layers(model).layers.items() if inputs[name]}
    wanted = {name: Wanted(timed_for) for name in found} if isinstance(timed_for, Method) else timed_for
    layers = {name: one for name, one in found.items() if name in wanted or isinstance(one, FactorizedLayer)}
    if not layers:
        raise ValueError("cost='latency': the run must call a layer that can be factorized, and it calls none.")
    with untouched(model), as_written():
        return measure(model, layers, inputs, run, wanted, progress)


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
