"""Neighbours: other callbacks that hold the module's layers, or their names, and follow a compression."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lr_callback.averages import averaged_layers
from lr_callback.host.packages import callbacks_of, is_a
from lr_callback.surgery import SurgeryReport


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


def check_neighbours(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what a compression cannot be combined with.

    Raises:
        MisconfigurationException: If the Trainer has a ModelPruning, or the module an average inside itself.
    """
    for callback in callbacks_of(trainer):
        if is_a(callback, "ModelPruning"):
            raise MisconfigurationException(
                f"LowRankCompression: the Trainer must have no ModelPruning, got {type(callback).__name__}. It goes on "
                "to prune the weights that it found before the training, which a compression takes out of the model, "
                "and reports a sparsity that no layer has. Prune in a run of its own, make it permanent, then compress."
            )
    inside = [name for name, module in pl_module.named_modules() if isinstance(module, AveragedModel)]
    if inside:
        raise MisconfigurationException(
            f"LowRankCompression: the module must hold no average of itself, found an AveragedModel as {inside[0]!r}. "
            "Its layers would be factorized apart from those that it averages, and the mean of two such layers is "
            "neither. Let a callback hold it: EMAWeightAveraging, or one of your own with an AveragedModel attribute."
        )


def check_alone(trainer: Trainer, kind: type) -> None:
    """Refuse a second callback of a kind: each would compress what the other has made, and read the other's files.

    Raises:
        MisconfigurationException: If there is one; Lightning itself refuses two of the very same class only.
    """
    found = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, kind)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"{kind.__name__}: the Trainer must have one of these callbacks, found {', '.join(found)}. For several "
            f"compressions give one of them lists: {kind.__name__}(keep_ratio=[0.5, 0.3], epochs=[10, 20])."
        )


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


def follow_averages(
    pl_module: nn.Module, averages: Iterable[nn.Module], made: Mapping[str, nn.Module]
) -> list[tuple[nn.Module, dict[str, nn.Module]]]:
    """Return the layers with which each average follows the model, beside the average, which is not changed.

    Args:
        pl_module: before its layers are replaced.
        averages: each a copy of the module or of one inside it.
        made: name of a layer of the module -> the layer that takes its place.

    Raises:
        MisconfigurationException: If it cannot be told what an average is of.
    """
    found: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    for average in averages:
        prefix = _prefix_of(pl_module, average)
        if prefix is not None:
            own = {name.removeprefix(prefix): layer for name, layer in made.items() if name.startswith(prefix)}
            found.append((average, averaged_layers(average, own)))
    return found


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


def rename_in_finetuning(
    trainer: Trainer, names: Mapping[str, nn.Parameter], report: SurgeryReport, pl_module: nn.Module, undo: ExitStack
) -> None:
    """Let BaseFinetuning's record of each optimizer group, which a resumed run reads, name the new parameters.

    Args:
        trainer: whose callbacks are looked at.
        names: of the module's parameters before the surgery.
        report: of the surgery.
        pl_module: after the surgery.
        undo: given what puts the names back.
    """
    new_names = _renamed(names, report, pl_module)
    for callback in callbacks_of(trainer):
        record = getattr(callback, "_internal_optimizer_metadata", None)
        if not is_a(callback, "BaseFinetuning") or not isinstance(record, dict):
            continue
        for group in (group for groups in record.values() for group in groups):
            listed = list(group["params"])
            undo.callback(group.__setitem__, "params", listed)
            group["params"] = [new for old in listed for new in new_names.get(old, [old])]


def _renamed(names: Mapping[str, nn.Parameter], report: SurgeryReport, pl_module: nn.Module) -> dict[str, list[str]]:
    """Return the new names of what had each name."""
    after = {parameter: name for name, parameter in pl_module.named_parameters()}
    heirs: dict[str, Sequence[nn.Parameter]] = {
        name: report.replacements.get(parameter, (parameter,)) for name, parameter in names.items()
    }
    return {name: [after[one] for one in new if one in after] for name, new in heirs.items()}


def retire(layers: Mapping[str, nn.Module], undo: ExitStack) -> None:
    """Let layers that were taken out of a model raise an error when they are called, instead of training nothing.

    Args:
        layers: by the names that they had.
        undo: given what lets them be called again.
    """
    for name, layer in layers.items():
        former = dict(vars(layer))
        undo.callback(_restore_forward, layer, former)
        vars(layer)["forward"] = _Retired(name)


def _restore_forward(layer: nn.Module, former: Mapping[str, object]) -> None:
    if "forward" in former:
        vars(layer)["forward"] = former["forward"]
    else:
        vars(layer).pop("forward", None)


class _Retired:
    """What a layer that was taken out of the model does when it is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *inputs: object, **options: object) -> None:
        raise RuntimeError(
            f"{self.name}: this layer was replaced by LowRankCompression and must not be called any more, but "
            "something still holds it, such as a plain list, a closure or a callback. What it computes trains "
            "nothing. Hold layers in attributes or an nn.ModuleList and call them from there, or leave this one out: "
            f"exclude=[{self.name!r}]."
        )
