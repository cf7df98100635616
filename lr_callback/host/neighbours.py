"""Neighbours: other callbacks that hold the module's layers, or their names, and follow a compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lr_callback.edits.surgery import SurgeryReport
from lr_callback.host.packages import callbacks_of, is_a


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
