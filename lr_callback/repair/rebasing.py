"""Rebasing: BatchNorm layers divide by what comes into them now, and give what they gave.

A layer that is fitted to less than the layer before gives less of its variance: what it cannot tell, it leaves out. In
eval mode a BatchNorm layer takes that as it is. In train mode it divides by the deviations of the batch, and scales it
up again together with its errors, layer after layer: a network that is right in eval mode would begin to train as
another one, far off. So the variance that a layer expects, and its weight, shrink by as much as its inputs did. Then
eval mode is as it was, and train mode begins with the network that the refit has found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lr_callback.calibration.collect import merged
from lr_callback.common.processes import Processes
from lr_callback.common.untouched import putting_back
from lr_callback.layers.layer_types import full_name
from lr_callback.mathematics.moments import SecondMoments
from lr_callback.model.following import batchnorm_layers, held_by, meeting
from lr_callback.model.holders import owners_of_parameters
from lr_callback.model.running import run_batches

Batch = TypeVar("Batch")

_PLAIN = frozenset(
    f"torch.nn.modules.batchnorm.{name}" for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
) | {"timm.layers.norm_act.BatchNormAct2d"}
"""Classes that multiply by the weight over the root of the variance; by name, so that nothing is imported for it."""


@contextmanager
def rebasing(
    model: nn.Module,
    former: AbstractContextManager[object],
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    processes: Processes,
) -> Iterator[None]:
    """Let BatchNorm layers expect, after what is done inside, the variances that come into them then.

    With ``r`` the variance after over the variance before, on the same batches, the running variance ``v`` becomes
    ``v'`` with ``v' + eps = r (v + eps)``, and the weight is multiplied by the root of ``r``. Layers are left alone
    that are frozen (in eval mode in a model in train mode, or with a weight that is not trained), that keep no
    statistics, that have no weight or share it, that are of a subclass, which may compute something else, and those
    whose inputs are not finite or that are not called; so are channels whose statistics are not finite, or would not
    be. If anything fails, statistics, weights and biases of all BatchNorm layers are as they were.

    Args:
        model: on the device of the batches; it is run in eval mode, before and after.
        former: within it the model is that of before.
        batches: of the training, with its augmentation.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
        processes: of a distributed run, each with batches of its own; all get the variances of all batches.

    Raises:
        ValueError: If there are no batches.
        RuntimeError: If another process failed.
    """
    norms = batchnorm_layers(model)
    put_back = putting_back(held_by(norms))
    try:
        layers = _own(model, norms)
        with former:
            before = _variances(model, layers, batches, forward, processes)
        yield
        after = _variances(model, layers, batches, forward, processes)
        for name in before.keys() & after.keys():
            _rebase(layers[name], before[name], after[name])
    except BaseException:
        put_back()
        raise


def _own(model: nn.Module, norms: Iterable[_BatchNorm]) -> dict[str, _BatchNorm]:
    """Return the layers that compute what they are called, and whose weight is theirs alone, and is trained."""
    owners = owners_of_parameters(model)
    names = {module: name for name, module in model.named_modules()}
    plain = [norm for norm in norms if full_name(type(norm)) in _PLAIN]
    weights = {norm: norm._parameters.get("weight") for norm in plain if norm.running_var is not None}
    return {
        names[norm]: norm
        for norm, weight in weights.items()
        if weight is not None and weight.requires_grad and not is_lazy(weight) and len(owners[id(weight)]) == 1
    }


def _variances(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    processes: Processes,
) -> dict[str, Tensor]:
    """Return the variances of what comes into layers, channel by channel, where they are finite."""
    if not layers:
        return {}

    def measure() -> dict[str, SecondMoments]:
        with _watched(layers) as moments:
            run_batches(model, batches, forward, (), lambda *_: None)
        return {name: one.cpu() for name, one in moments.items()}

    found = merged(processes.gather(measure, long=True))
    variances = {name: (one.products - one.means.square())[0].clamp(min=0) for name, one in found.items()}
    return {name: one for name, one in variances.items() if bool(one.isfinite().all())}


@contextmanager
def _watched(layers: Mapping[str, _BatchNorm]) -> Iterator[dict[str, SecondMoments]]:
    """Measure what comes into some layers; of what is not finite the moments are NaN."""
    moments: dict[str, SecondMoments] = {}
    names = {norm: name for name, norm in layers.items()}

    def see(norm: _BatchNorm, inputs: Tensor) -> None:
        name, rows = names[norm], inputs.transpose(1, -1).reshape(1, -1, inputs.shape[1])
        if name not in moments:
            moments[name] = SecondMoments(rows.shape[2], diagonal=True, sync_on_compute=False).to(rows.device)
        if bool(rows.isfinite().all()):
            moments[name].update(rows)
        else:
            moments[name].total.fill_(torch.nan)

    with meeting(names, see):
        yield moments


@torch.no_grad()
def _rebase(norm: _BatchNorm, before: Tensor, after: Tensor) -> None:
    variance, weight = norm.running_var, norm.weight
    assert variance is not None
    former = variance.double() + norm.eps
    ratio = ((after + norm.eps) / (before + norm.eps)).to(former.device)
    latter = (ratio * former).clamp(min=norm.eps)
    root = (latter / former).sqrt()
    expected, scaled = (latter - norm.eps).to(variance), (weight * root).to(weight)
    is_sound = (root > 0) & root.isfinite() & expected.isfinite() & scaled.isfinite()
    variance.copy_(torch.where(is_sound, expected, variance))
    weight.copy_(torch.where(is_sound, scaled, weight))
