"""Probe: see how a host calls a model, and repeat it later, without knowing what its batches look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lr_callback.common.example import Example
from lr_callback.model.heard import Invocation, copied
from lr_callback.model.observe import Observation, Timed, observe_run
from lr_callback.model.running import told
from lr_callback.units.latency import Progress


def _in_backward() -> bool:
    """Return whether autograd is at work, where gradient checkpointing makes the calls of the forward pass again."""
    return torch._C._current_graph_task_id() != -1


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether a module has a forward of its own; its class's, put back after a step, is none."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


class Probe:
    """Record the outermost calls of a model's modules, from :meth:`start` to :meth:`stop`.

    A LightningModule's step may call the module itself, a network inside it, or several parts: each call that does not
    stand inside another is kept with its arguments, and can be repeated.

    Args:
        model: whose modules are watched.
        copies: whether the calls are repeated with copies of their arguments: a model may write to them.

    Example::

        >>> model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
        >>> probe = Probe(model)
        >>> probe.start()
        >>> _ = model["head"](model["body"](torch.zeros(3, 4)))
        >>> probe.stop()
        >>> probe.observe().dense_multiply_adds
        72
    """

    def __init__(self, model: nn.Module, copies: bool = False) -> None:
        self._model, self._copies = model, copies
        self._names: dict[nn.Module, str] = {}
        self._calls: list[Invocation] = []
        self._handles: list[RemovableHandle] = []
        self._inside: list[bool] = []

    @property
    def seen(self) -> bool:
        """Whether a call was recorded."""
        return bool(self._calls)

    @property
    def calls(self) -> list[tuple[nn.Module, Example]]:
        """The modules that were called, in order, and with what."""
        return [(call.module, Example(call.arguments, call.named)) for call in self._calls]

    def start(self) -> None:
        """Watch the calls of all modules."""
        for name, module in self._model.named_modules():
            self._names[module] = name
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> None:
        """Watch no longer; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inside.clear()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Metrics and losses are called in a step too; what has no parameters is not part of the network.
        weight = next(module.parameters(), None)
        # On several processes a host runs its step through the model's call, with a forward that is there only then:
        # the calls to repeat are those that the step makes.
        is_step = not self._inside and module is self._model and _is_wrapped(module)
        if weight is not None and not is_step and not any(self._inside) and not _in_backward():
            given = copied((arguments, named)) if self._copies else (arguments, named)
            self._calls.append(Invocation.of(module, *given, weight))
        self._inside.append(not is_step)

    def _leave(self, module: nn.Module, arguments: object, outputs: object) -> None:
        self._inside.pop()

    def repeat(self, model: nn.Module | None = None) -> list[object]:
        """Make the recorded calls again, of what stands in the places of the modules now; return what they give.

        Args:
            model: a copy of the watched one, whose modules are called instead.
        """
        places = self._model if model is None else model
        return [call.repeat(places.get_submodule(self._names[call.module]), self._copies) for call in self._calls]

    def observe(
        self, timed_for: Timed | None = None, progress: Progress | None = None, activations: bool = False
    ) -> Observation:
        """Count the multiply-adds of the recorded calls, and see how each layer is called in them.

        Args:
            timed_for: see :func:`lr_callback.model.observe.observe`.
            progress: told of each layer that is timed.
            activations: see :func:`lr_callback.model.observe.observe`.

        Raises:
            ValueError: If the calls cannot be made again.
        """
        what = "the network's calls of the first batch must be possible again"
        way_out = "let them run so, set the module's `example_input_array`, or keep parameters or bytes"
        given = [(call.arguments, call.named) for call in self._calls] if activations else ()
        return observe_run(self._model, told(self._model, self.repeat, what, way_out), timed_for, progress, given)
