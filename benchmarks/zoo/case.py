"""A case: one model of the zoo, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Arguments = tuple[Any, ...] | dict[str, Any]
"""Of one call of a model, positional or by name."""


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Args:
        name: of the model in its package.
        package: torchvision, timm or transformers.
        make: builds it, dense, with random weights.
        inputs: makes the arguments of a call in eval mode, the same each time; a model may write into them.
        training_inputs: of a call in train mode; None: the same.
        selects: whether it chooses among its outputs by comparing them, where the last bit may decide; factors and
            their product are then compared in float64.
        giant: whether its analysis takes many minutes: run last.
    """

    name: str
    package: str
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], Arguments] = field(repr=False)
    training_inputs: Callable[[], Arguments] | None = field(repr=False, default=None)
    selects: bool = False
    giant: bool = False

    @property
    def key(self) -> str:
        """What names the case among those of all packages."""
        return f"{self.package}/{self.name}"

    def call(self, model: nn.Module) -> list[Tensor]:
        """Call a model in the mode that it is in; return all floating-point tensors of what it returns."""
        arguments = self.training_inputs() if model.training and self.training_inputs else self.inputs()
        if next(model.parameters()).dtype == torch.float64:
            arguments = tree_map_only(Tensor, lambda one: one.double() if one.is_floating_point() else one, arguments)
        outputs = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
        found = [tensor for tensor in tensors(outputs) if tensor.is_floating_point()]
        if not found:
            raise AssertionError(f"{self.key}: the model returned no floating-point tensor, but {type(outputs)}")
        return found


def tensors(outputs: object) -> Iterator[Tensor]:
    """Yield the tensors in what a model returns; caches and other objects are left out."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors(value)
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        for one in fields(outputs):
            yield from tensors(getattr(outputs, one.name))
