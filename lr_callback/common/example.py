"""Example: the arguments of one call of a model, and the same call with another number of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a model.

    Args:
        arguments: by position.
        named: by name.

    Example::

        >>> example = Example.of((torch.zeros(2, 3), torch.ones(2)))
        >>> [tuple(tensor.shape) for tensor in example.with_rows(5).tensors]
        [(5, 3), (5,)]
    """

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_input: object) -> Example:
        """Read a tensor, a tuple or list of positional arguments, or a dict of named ones.

        Raises:
            ValueError: If there is no tensor in it.
        """
        if isinstance(example_input, Mapping):
            example = cls(named=dict(example_input))
        else:
            example = cls(tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,))
        if not example.tensors:
            raise ValueError(
                "`example_input` must be a tensor, a tuple of positional arguments or a dict of named ones, with a "
                f"tensor among them, got {type(example_input).__name__}; give a batch as the model is called with. "
                "Nothing was written."
            )
        return example

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, those by position first."""
        return [leaf for leaf in tree_leaves((self.arguments, self.named)) if isinstance(leaf, Tensor)]

    @property
    def rows(self) -> int | None:
        """The number of rows, which all tensors have on their first axis; None if they have different ones."""
        sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in self.tensors}
        return sizes.pop() if len(sizes) == 1 else None

    def call(self, model: Callable[..., object]) -> object:
        """Call a model."""
        return model(*self.arguments, **self.named)

    def with_rows(self, rows: int) -> Example:
        """Return the same call with so many rows: the first ones, or all of them again and again."""

        def resized(leaf: object) -> object:
            return leaf[torch.arange(rows, device=leaf.device) % leaf.shape[0]] if isinstance(leaf, Tensor) else leaf

        return Example(*tree_map(resized, (self.arguments, self.named)))

    def axes(self, model: nn.Module, batch: object) -> dict[str, Any]:
        """Return which axes of the arguments may change, as ``torch.export`` asks: the first one of each tensor.

        Args:
            model: whose ``forward`` gives the arguments their names.
            batch: what stands for the number of rows.
        """
        bound = inspect.signature(model.forward).bind(*self.arguments, **self.named)
        axes: dict[str, Any] = tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, bound.arguments)
        return axes


def classes_around(values: object) -> set[type]:
    """Return the classes, besides those of Python and torch, whose objects hold the tensors among values.

    Example::

        >>> classes_around([torch.zeros(1), {"one": (torch.ones(1), None)}])
        set()
    """
    kinds: set[type] = set()

    def note(value: object) -> bool:
        kinds.add(type(value))
        return False

    kinds -= {type(leaf) for leaf in tree_leaves(values, is_leaf=note)}
    return {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("builtins", "collections", "torch")}


def largest_difference(expected: object, found: object) -> float | None:
    """Return the largest difference of two outputs, each tensor's relative to its largest value.

    Args:
        expected: tensors, in any nesting.
        found: the same tensors, in any nesting; what is not a tensor is passed over in both.

    Returns:
        None if there are not as many tensors, or one has another shape or dtype, or other whole numbers, or is not
        finite where the other is.
    """
    pairs = [[leaf for leaf in tree_leaves(one) if isinstance(leaf, Tensor)] for one in (expected, found)]
    if not pairs[0] or [(one.shape, one.dtype) for one in pairs[0]] != [(one.shape, one.dtype) for one in pairs[1]]:
        return None
    differences = [_difference(one.detach().cpu(), other.detach().cpu()) for one, other in zip(*pairs, strict=True)]
    known = [one for one in differences if one is not None]
    return max(known) if len(known) == len(differences) else None


def _difference(expected: Tensor, found: Tensor) -> float | None:
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, found) else None
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return None
    one, other = expected[finite].to(torch.complex128), found[finite].to(torch.complex128)
    largest = float(one.abs().max()) if one.numel() else 0.0
    return float((one - other).abs().max()) / (largest or 1.0) if one.numel() else 0.0
