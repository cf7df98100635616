"""Activations: the bytes that a run of a model keeps for its backward pass, and what a factorized layer adds to them.

Counted are the tensors that autograd saves, each storage once, and what is still held when the run has ended;
parameters, buffers and the input batch are left out. A layer's own part is found without values: the layer and its
forms are called on the meta device as the layer was in the run, and torch says what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lr_callback.decisions.costs import ACTIVATION_MEMORY, CountedCost, LayerCost
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_cost, layer_type
from lr_callback.layers.weightless import Forms, bare, weightless
from lr_callback.mathematics.folding import Geometry


@dataclass(frozen=True)
class KeptCall:
    """One call of a layer in a run with gradients, as far as it decides what is saved.

    Args:
        shape: of the input.
        strides: of the input.
        dtype: of the input.
        has_gradient: whether the input has one.
        autocast: dtype of autocast during the call; None: off.
        outputs: sizes of the output of a transposed convolution, which its input leaves open; else none.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool
    autocast: torch.dtype | None = None
    outputs: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> KeptCall:
        """Describe a call that was just made of a dense or factorized layer."""
        kind, device = layer_type(layer), inputs.device.type
        assert kind is not None
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        sizes = kind.call(inputs, outputs).outputs if kind.works == "at inputs" else ()
        return cls(tuple(inputs.shape), inputs.stride(), inputs.dtype, inputs.requires_grad, autocast, sizes)

    def made(self) -> Tensor:
        """Return such an input without values; under autocast in its dtype."""
        dtype = self.autocast if self.autocast is not None and self.dtype == torch.float32 else self.dtype
        given = torch.empty_strided(self.shape, self.strides, dtype=dtype, device="meta")
        return given.requires_grad_(self.has_gradient)

    def repeat(self, module: nn.Module, given: Tensor) -> object:
        """Make the call of a layer without values."""
        return module(given, list(self.outputs)) if self.outputs else module(given)

    def to_list(self) -> list[Any]:
        """Return it as lists and numbers."""
        names = [None if one is None else str(one).removeprefix("torch.") for one in (self.dtype, self.autocast)]
        return [list(self.shape), list(self.strides), names[0], self.has_gradient, names[1], list(self.outputs)]

    @classmethod
    def from_list(cls, written: Sequence[Any]) -> KeptCall:
        """Read what :meth:`to_list` wrote."""
        shape, strides, dtype, has_gradient, autocast, outputs = written
        cast = None if autocast is None else getattr(torch, autocast)
        return cls(tuple(shape), tuple(strides), getattr(torch, dtype), has_gradient, cast, tuple(outputs))


@dataclass(frozen=True)
class Activations:
    """What a run keeps for its backward pass.

    Args:
        dense: bytes, with all layers dense.
        calls: layer name -> its calls that are a part of the backward pass.
    """

    dense: int
    calls: Mapping[str, tuple[KeptCall, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists and numbers."""
        return {"dense": self.dense, "calls": {name: [one.to_list() for one in of] for name, of in self.calls.items()}}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Activations:
        """Read what :meth:`to_dict` wrote."""
        calls = {name: tuple(map(KeptCall.from_list, of)) for name, of in written["calls"].items()}
        return cls(written["dense"], calls)


class Saved:
    """A context that notes what autograd saves in it.

    Args:
        apart: tensors whose memory does not count.

    Example::

        >>> layer, inputs = nn.Linear(4, 3), torch.zeros(2, 4)
        >>> with Saved([inputs, *layer.parameters()]) as saved:
        ...     outputs = layer(inputs).exp()
        >>> saved.bytes  # the output of exp, 2 x 3 entries
        24
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self._apart = {_storage(tensor) for tensor in apart if _has_storage(tensor)}
        self._found: dict[_Held, int] = {}
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> Saved:
        """Begin to note."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Note no longer."""
        self._hooks.__exit__()

    def _note(self, tensor: Tensor) -> Tensor:
        if _has_storage(tensor):
            self._found.setdefault(_storage(tensor), tensor.untyped_storage().nbytes())
        return tensor.detach()  # an output that is saved as it is would hold itself

    @property
    def bytes(self) -> int:
        """Bytes of what was saved and is still held, each storage once."""
        return sum(size for held, size in self._found.items() if held not in self._apart and not held.expired())


class _Held(Protocol):
    """Stands for a storage, and knows when it is gone: its address may then be another's."""

    def expired(self) -> bool: ...


def _storage(tensor: Tensor) -> _Held:
    held: _Held = import_module("torch.multiprocessing.reductions").StorageWeakRef(tensor.untyped_storage())
    return held


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def count_kept(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object], given: object
) -> Activations:
    """Run a model with gradients, and count what is kept for its backward pass, with all layers dense.

    Args:
        model: that is run, in the mode in which it is trained.
        layers: name -> its layers that can be factorized, dense or factorized.
        run: calls the model, or parts of it.
        given: the arguments of the calls; those tensors that have no gradient are the input batch.

    Raises:
        ValueError: If nothing is kept.
    """
    batch = [one for one in tree_leaves(given) if isinstance(one, Tensor) and not one.requires_grad]
    calls: dict[str, list[KeptCall]] = {name: [] for name in layers}
    with torch.enable_grad(), _noting(layers, calls), Saved([*batch, *model.parameters(), *model.buffers()]) as saved:
        outputs = run()
    kept = saved.bytes
    del outputs  # and with it all that is kept
    for name, layer in layers.items():
        if isinstance(layer, FactorizedLayer) and calls[name]:
            cost = ActivationCost.of(layer, calls[name])
            kept -= cost.at(layer.folding, layer.num_slices, layer.rank) - cost.dense
    if kept <= 0:
        raise ValueError(
            f"cost={ACTIVATION_MEMORY!r}: a run must keep something for its backward pass besides parameters and the "
            "input batch, to keep a fraction of it, and this one keeps nothing. Leave the unit out."
        )
    return Activations(kept, {name: tuple(of) for name, of in calls.items()})


@contextmanager
def _noting(layers: Mapping[str, nn.Module], calls: Mapping[str, list[KeptCall]]) -> Iterator[None]:
    """Note the calls of layers; one without gradients keeps nothing."""

    def noting(of: list[KeptCall]) -> Callable[..., None]:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], outputs: Tensor) -> None:
            kind = layer_type(layer)
            if kind is not None and torch.is_grad_enabled():
                of.append(KeptCall.of(layer, inputs[0] if inputs else named[kind.argument], outputs))

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(noting(calls[name]), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class ActivationCost(LayerCost):
    """Bytes that one layer keeps for the backward pass besides its input; ``fixed + rank * per_rank`` where factorized.

    Args:
        geometry: sizes of the weight.
        module: the layer, dense and without values.
        calls: of the layer.
        counted: parameters of the layer, by which equal foldings are told apart.
        known: (folding, number of slices) -> bytes at rank 1, and of each rank more.
    """

    gates: ClassVar[bool] = False
    geometry: Geometry
    module: nn.Module
    calls: tuple[KeptCall, ...]
    counted: CountedCost
    known: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: nn.Module, calls: Sequence[KeptCall]) -> ActivationCost:
        """Return the cost of a dense or factorized layer in some calls."""
        counted = layer_cost(layer)
        return cls(counted.geometry, weightless(layer), tuple(calls), counted)

    @cached_property
    def dense(self) -> int:
        """Bytes that the dense layer keeps: mostly none, what it saves is its input."""
        return _kept_by(self.module, self.calls)

    def at(self, folding: str, num_slices: int, rank: int) -> int:
        """Return the bytes that one form keeps."""
        return _kept_by(Forms(self.module, folding, num_slices).at(rank), self.calls)

    def at_ranks(self, folding: str, num_slices: int, last: int) -> Tensor:
        """Return the bytes that the factorized layer keeps at rank 0 to ``last``, int64."""
        key = (folding, num_slices)
        if key not in self.known:
            first = self.at(folding, num_slices, 1)
            self.known[key] = first, self.at(folding, num_slices, 2) - first
        first, more = self.known[key]
        return first + (torch.arange(last + 1) - 1) * more

    def last_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank that keeps less than the dense layer; mostly 0, for none does."""
        costs = self.at_ranks(folding, num_slices, self.geometry.full_rank(folding, num_slices))
        return max((costs[1:] < self.dense).nonzero().flatten().add(1).tolist(), default=0)

    def distinct_foldings(self, foldings: Iterable[str]) -> tuple[str, ...]:
        """Drop foldings that give the same matrices as another; the one with the fewest parameters stays."""
        return self.counted.distinct_foldings(foldings)


def _kept_by(module: nn.Module, calls: Sequence[KeptCall]) -> int:
    """Return the bytes that calls of a layer without values keep besides their inputs.

    Autocast makes copies of weights, which are kept: under it the layer is one in the other dtype, and these count.
    """
    total = 0
    for cast in dict.fromkeys(call.autocast for call in calls):
        copies = cast is not None and next(module.parameters()).dtype == torch.float32
        own = bare(module).to(cast) if copies else module
        given = [(call, call.made()) for call in calls if call.autocast == cast]
        apart = [inputs for _, inputs in given] + ([] if copies else list(own.parameters()))
        with torch.enable_grad(), Saved(apart) as saved:
            outputs = [call.repeat(own, inputs) for call, inputs in given]
        total += saved.bytes
        del outputs  # and with them what is saved
    return total
