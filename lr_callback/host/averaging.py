"""Averaging: averages of the module's weights, held by other callbacks, follow a compression and its repair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lr_callback.edits.averages import averaged_layers, moved, repaired
from lr_callback.edits.surgery import replace_layers
from lr_callback.host.packages import callbacks_of, is_a

Value = TypeVar("Value")


def held_averages(trainer: Trainer) -> list[nn.Module]:
    """Return the averages of weights that callbacks hold.

    These are what WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging hold, and every ``AveragedModel``
    of torch in an attribute of a callback. A plain copy may as well be a teacher that is to stay as it is: one that is
    an average is named by overriding ``LowRankCompression.averages``.
    """
    return list(dict.fromkeys(one for callback in callbacks_of(trainer) for one in _averages_of(callback)))


def _averages_of(callback: object) -> Iterator[nn.Module]:
    for name, value in vars(callback).items():
        if isinstance(value, AveragedModel):
            yield value.module
        elif name == "_average_model" and isinstance(value, nn.Module) and is_a(callback, "StochasticWeightAveraging"):
            yield value


def align_averages(pl_module: LightningModule, averages: Iterable[nn.Module]) -> None:
    """Give an average that was made before a file was read, and is not in the file, the module's structure and weights.

    Without it an average that begins in a run that is resumed after a compression would be of the dense module.

    Args:
        pl_module: after the file was read.
        averages: with the hook that adapts their structure; those of another type are left alone.

    Raises:
        MisconfigurationException: If it cannot be told what an average is of.
    """
    shapes = _shapes(pl_module)
    for average in averages:
        if type(average) is type(pl_module) and _shapes(average) != shapes:
            average.load_state_dict(pl_module.state_dict())
        _prefix_of(pl_module, average)


@dataclass(frozen=True)
class Follower:
    """An average, and what it takes over in order to follow its model; it is not changed before :meth:`follow`.

    Args:
        average: of a model's weights.
        layers: name -> the layer that takes its place.
        values: name of a parameter or buffer -> its value.
    """

    average: nn.Module
    layers: Mapping[str, nn.Module]
    values: Mapping[str, Tensor]

    @torch.no_grad()
    def follow(self, undo: ExitStack) -> None:
        """Take over values and layers; what undoes each goes on a stack before."""
        held = _tensors(self.average)
        for name, value in self.values.items():
            undo.callback(held[name].data.copy_, held[name].detach().clone())
            held[name].copy_(value)
        replace_layers(self.average, self.layers, undo=undo)


def followers(
    pl_module: nn.Module,
    averages: Iterable[nn.Module],
    former: Mapping[str, nn.Module],
    made: Mapping[str, nn.Module],
    before: Mapping[str, Tensor],
) -> list[Follower]:
    """Return what each average takes over.

    Args:
        pl_module: repaired, before its layers are replaced.
        averages: each a copy of the module or of one inside it.
        former: name of a layer of the module -> the one that stands there.
        made: name of a layer of the module -> the one that takes its place.
        before: what the repair may have changed, as it was: :func:`lr_callback.edits.averages.repaired`.

    Raises:
        MisconfigurationException: If it cannot be told what an average is of.
    """
    after = repaired(pl_module, former)
    changed = {name: (value, after[name]) for name, value in before.items() if not torch.equal(value, after[name])}
    found: list[Follower] = []
    for average in averages:
        prefix = _prefix_of(pl_module, average)
        if prefix is not None:
            own, held = _below(prefix, made), _tensors(average)
            moves = _below(prefix, changed).items()
            values = {name: moved(name, held[name], *change, _eps(average, name)) for name, change in moves}
            found.append(Follower(average, averaged_layers(average, _below(prefix, former), own), values))
    return found


def _eps(module: nn.Module, name: str) -> float:
    """Return what the BatchNorm layer that holds a value adds to variances; 0 for another layer."""
    return float(getattr(module.get_submodule(name.rpartition(".")[0]), "eps", 0.0))


def _below(prefix: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is inside a module, by its names there."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _prefix_of(pl_module: nn.Module, average: nn.Module) -> str | None:
    """Return what the names of an average's layers lack of their names in the module; None: it is of something else.

    Raises:
        MisconfigurationException: If there are several answers.
    """
    shapes = _shapes(average)
    same_type = [(name, one) for name, one in pl_module.named_modules() if type(one) is type(average)]
    places = [name for name, one in same_type if _shapes(one) == shapes]
    if len(places) > 1:
        raise MisconfigurationException(
            f"LowRankCompression: it must be clear what each average is of, one {type(average).__name__} can be of "
            f"{', '.join(places)}, which are alike. Average the module that holds them. Nothing was changed."
        )
    if not places:
        return None
    return f"{places[0]}." if places[0] else ""


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.named_parameters()}
