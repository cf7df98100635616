"""Heard: the outermost calls that are made of some modules, with what they were given and what they gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

Values = TypeVar("Values")


@dataclass(frozen=True)
class Invocation:
    """A call, and what it was made under: the device's type, and the dtypes of autocast and of new tensors.

    Args:
        module: that was called.
        arguments: by position.
        named: by name.
        device: type of the device of the module's parameters.
        autocast: its dtype; None where it was off.
        default: dtype of new tensors, which the precision of a run may have changed for its steps.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    device: str
    autocast: torch.dtype | None
    default: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], weight: Tensor) -> Invocation:
        """Note a call that is about to be made; ``weight`` is any parameter of the module."""
        kind = weight.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return cls(module, arguments, named, kind, autocast, torch.get_default_dtype())

    def repeat(self, module: nn.Module, again: bool = False) -> object:
        """Make the same call of a module; with copies of the arguments, if it is to be made ``again``."""
        arguments, named = copied((self.arguments, self.named)) if again else (self.arguments, self.named)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.default)
        try:
            with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
                return module(*arguments, **named)
        finally:
            torch.set_default_dtype(before)


class Heard:
    """The outermost calls of some modules, those without parameters left out; a call inside another is a part of it.

    Hooks stay where they are between two times of :meth:`listening`: for others, what is compiled is compiled anew.

    Attributes:
        invocations: with copies of the arguments, which the call itself may write to.
        outputs: what each gave.

    Example::

        >>> model, heard = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Heard()
        >>> heard.attach(model.modules())
        >>> with heard.listening():
        ...     _ = model(torch.zeros(2, 4))
        >>> [one.module is model for one in heard.invocations], tuple(heard.outputs[0].shape)
        ([True], (2, 3))
    """

    def __init__(self) -> None:
        self.invocations: list[Invocation] = []
        self.outputs: list[object] = []
        self._on = False
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def __reduce__(self) -> tuple[type[Heard], tuple[()]]:
        """Let copies of a module, and files of it, have hooks that do nothing."""
        return (Heard, ())

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Watch modules, and no others."""
        self.detach()
        for module in modules:
            if next(module.parameters(), None) is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Watch no module."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear calls, and nothing of those before."""
        self.forget()
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def forget(self) -> None:
        """Let go of what was heard."""
        self.invocations.clear()
        self.outputs.clear()
        self._depth = 0

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._on:
            return
        if not self._depth:
            arguments, named = tree_map(_own, (arguments, named))
            self.invocations.append(Invocation.of(module, arguments, named, next(module.parameters())))
        self._depth += 1

    def _leave(self, module: nn.Module, arguments: object, output: object) -> None:
        if not self._on:
            return
        self._depth -= 1
        if not self._depth:
            self.outputs.append(output)


def copied(values: Values) -> Values:
    """Return arguments with tensors and containers of their own; a tensor that is given twice stays one.

    Example::

        >>> one = torch.zeros(2)
        >>> first, second = copied((one, {"again": one}))
        >>> first is one, first is second["again"]
        (False, True)
    """
    made: dict[int, Tensor] = {}

    def copy(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return made.setdefault(id(value), value.detach().clone())

    copies: Values = tree_map(copy, values)
    return copies


def _own(value: object) -> object:
    # Dynamo compiles the hook along with the network, anew for each other id that it would look at.
    return value.detach().clone() if isinstance(value, Tensor) else value
