"""Following: which BatchNorm layers take the very outputs of a layer, seen in runs of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lr_callback.common.processes import Processes
from lr_callback.layers.layer_types import layer_type
from lr_callback.model.running import run_batches, runner, watching

Batch = TypeVar("Batch")
Meet = Callable[[nn.Module, _BatchNorm, Tensor], None]
"""Told of a layer, a BatchNorm layer that takes its outputs, and these."""


class Following:
    """What runs of a model show of some layers.

    Args:
        able: the BatchNorm layers that may be told of as takers.

    Attributes:
        calls: how often each layer was called, in the order of the first calls.
        pairs: a layer and a BatchNorm layer that took its very outputs, unchanged -> how often.
        norms: how often each BatchNorm layer was called.
        used: how often the outputs of a layer went anywhere else.
    """

    def __init__(self, able: Iterable[_BatchNorm] = ()) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.pairs: Counter[tuple[nn.Module, _BatchNorm]] = Counter()
        self.norms: Counter[_BatchNorm] = Counter()
        self.used: Counter[nn.Module] = Counter()
        self.given = Given()
        self._able = set(able)

    def takers(self) -> dict[nn.Module, _BatchNorm]:
        """Return the layers whose outputs go to one BatchNorm layer each and nowhere else, and nothing else goes there.

        A constant that is added to the outputs of such a layer, and to the mean that the other subtracts, changes
        nothing. Layers are left out whose BatchNorm keeps no mean or is frozen.
        """
        return {
            layer: norm
            for (layer, norm), times in self.pairs.items()
            if norm in self._able and times == self.calls[layer] == self.norms[norm] and not self.used[layer]
        }

    def watched(self, run: Callable[[Batch], object]) -> Callable[[Batch], None]:
        """Return what runs the model on a batch, and sees which outputs of layers it returns."""

        def watched(batch: Batch) -> None:
            self.used.update(self.given.owners(tree_leaves(run(batch))))

        return watched


@contextmanager
def following(model: nn.Module, layers: Iterable[nn.Module], meet: Meet | None = None) -> Iterator[Following]:
    """See in the runs of a model what becomes of the outputs of some layers.

    Args:
        model: that is run.
        layers: to look at.
        meet: told of each pair, each time.
    """
    found = Following(batchnorm_layers(model))

    def leave(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        found.calls[layer] += 1
        found.given.add(layer, outputs)

    def take(norm: _BatchNorm, inputs: Tensor) -> None:
        found.norms[norm] += 1
        layer = found.given.owner(inputs)
        if layer is not None and _is_by_channel(layer, inputs):
            found.pairs[layer, norm] += 1
            if meet is not None:
                meet(layer, norm, inputs)

    with _Uses(found) as uses, _at_work(model, take, uses), watching(layers, leave):
        yield found


def follow(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    layers: Iterable[nn.Module],
    meet: Meet | None = None,
) -> Following:
    """Run the first batch, and see what becomes of the outputs of some layers.

    Args:
        model: on the device of the batches; is not changed.
        batches: the first one is run.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
        layers: to look at.
        meet: told of each pair, each time.

    Raises:
        ValueError: If there are no batches.
    """
    with following(model, layers, meet) as found:
        run_batches(model, islice(batches, 1), found.watched(runner(model, forward)), (), lambda *_: None)
    return found


def look(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    layers: Mapping[str, nn.Module],
    processes: Processes,
) -> tuple[dict[str, int], dict[str, _BatchNorm]]:
    """Return how often layers are called on the first batch, and which BatchNorm takes the outputs of some.

    What the first process of a distributed run sees counts on all.
    """
    names = {layer: name for name, layer in layers.items()}
    modules: dict[str, nn.Module] = dict(model.named_modules())

    def see() -> tuple[dict[str, int], dict[str, str]]:
        found = follow(model, batches, forward, names)
        paths = {module: path for path, module in modules.items()}
        takers = {names[layer]: paths[norm] for layer, norm in found.takers().items()}
        return {names[layer]: times for layer, times in found.calls.items()}, takers

    calls, takers = processes.gather(see, long=True)[0]
    norms = {name: modules[path] for name, path in takers.items()}
    return calls, {name: norm for name, norm in norms.items() if isinstance(norm, _BatchNorm)}


class Given:
    """The outputs of layers, as long as somebody holds them and nobody has changed them."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[ref[Tensor], int, nn.Module]] = {}

    def add(self, layer: nn.Module, outputs: Tensor) -> None:
        """Note what a layer gave."""
        self._kept[id(outputs)] = ref(outputs), _version(outputs), layer

    def owner(self, tensor: object) -> nn.Module | None:
        """Return the layer that gave a tensor, as it is; None: no layer did."""
        # An id may be of a tensor that is gone, and what was changed in place is no layer's output any more.
        kept, version, layer = self._kept.get(id(tensor), (None, 0, None))
        if not isinstance(tensor, Tensor) or kept is None or kept() is not tensor:
            return None
        return layer if version == _version(tensor) else None

    def owners(self, values: Iterable[object]) -> list[nn.Module]:
        """Return the layers that gave some of the values."""
        return [layer for value in values if (layer := self.owner(value)) is not None]


class _Uses(TorchFunctionMode):
    """Counts what takes the outputs of layers and makes a tensor of them, outside of BatchNorm layers."""

    def __init__(self, found: Following) -> None:
        super().__init__()
        self._found = found
        self.inside = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Call the function, and count it."""
        named = dict(kwargs or {})
        owners = [] if self.inside else self._found.given.owners(tree_leaves((args, named)))
        result = func(*args, **named)
        if any(isinstance(one, Tensor) for one in tree_leaves(result)):
            self._found.used.update(owners)
        return result


def _is_by_channel(layer: nn.Module, outputs: Tensor) -> bool:
    """Return whether a layer's outputs are on the axis that a BatchNorm takes for its channels, the second."""
    kind = layer_type(layer)
    assert kind is not None
    return outputs.dim() == 2 or bool(kind.geometry(layer).kernel)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def meeting(norms: Iterable[_BatchNorm], take: Callable[[_BatchNorm, Tensor], None]) -> Iterator[None]:
    """Tell of each call of some BatchNorm layers and what they take, before it happens."""

    def before(norm: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(norm, _BatchNorm)
        take(norm, arguments[0] if arguments else named["input"])

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@contextmanager
def _at_work(model: nn.Module, take: Callable[[_BatchNorm, Tensor], None], uses: _Uses) -> Iterator[None]:
    """Tell of each call of a BatchNorm layer before it happens, and note when one is at work."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def enter(norm: _BatchNorm, inputs: Tensor) -> None:
        take(norm, inputs)
        uses.inside += 1

    def leave(norm: nn.Module, arguments: tuple[Any, ...], outputs: object) -> None:
        uses.inside -= 1

    with meeting(norms, enter), ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(leave).remove)
        yield


def held_by(norms: Iterable[_BatchNorm]) -> list[Tensor]:
    """Return the parameters and statistics of BatchNorm layers, but those that are not initialised yet."""
    every = (value for norm in norms for value in [*norm.parameters(recurse=False), *norm.buffers(recurse=False)])
    return [value for value in every if not is_lazy(value)]


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep statistics and are not frozen: in eval mode in a model in train mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and (module.training or not model.training)
    ]
