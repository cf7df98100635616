"""Rebasing: statistics of BatchNorm layers become those of what comes into them now; what they give stays as it is.

A layer that is fitted to less than the layer before gives less of its variance: what it cannot tell, it leaves out. In
eval mode a BatchNorm layer takes that as it is. In train mode it divides by the deviations of the batch, and scales it
up again together with its errors, layer after layer: a network that is right in eval mode would begin to train as
another one, far off. So the statistics are measured anew, and weight and bias of the layer take up the difference. Then
train mode divides by what the statistics say, and training goes on from the network that the refit has found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.collect import merged
from lr_callback.following import batchnorm_layers
from lr_callback.moments import SecondMoments
from lr_callback.processes import Processes
from lr_callback.running import run_batches

Batch = TypeVar("Batch")


def rebase_batchnorm_(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None = None,
    processes: Processes | None = None,
) -> int:
    """Measure the running statistics of BatchNorm layers anew, in place, and leave what they give in eval mode.

    With ``m``, ``v`` from before and ``m'``, ``v'`` of the layer's inputs over all batches, weight and bias become
    ``weight' = weight r`` with ``r = sqrt((v' + eps) / (v + eps))``, and
    ``bias' = bias + weight (m' - m) / sqrt(v + eps)``.

    Args:
        model: on the device of the batches; it is run in eval mode. Layers are left alone that are frozen (in eval mode
            in a model in train mode, or with parameters that are not trained), that keep no statistics, that have no
            weight and bias, or share them, and those whose inputs are not finite or which are not called.
        batches: training batches, with the augmentation of the training.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect.collect_moments`.
        processes: of a distributed run, each with batches of its own; all get the statistics of all batches.

    Returns:
        Number of layers that were rebased.

    Raises:
        ValueError: If there are no batches. Nothing was changed.
        RuntimeError: If another process failed. Nothing was changed.

    Example::

        >>> model, inputs = nn.Sequential(nn.BatchNorm1d(2)).eval(), torch.tensor([[0.0, 4.0], [2.0, 8.0]])
        >>> before = model(inputs)
        >>> rebase_batchnorm_(model, [inputs])
        1
        >>> model[0].running_mean.tolist(), torch.allclose(model(inputs), before)
        ([1.0, 6.0], True)
        >>> torch.allclose(model.train()(inputs), before)
        True
    """
    layers = _rebased(model)
    if not layers:
        return 0

    def measure() -> dict[str, SecondMoments]:
        with _measuring(layers) as moments:
            run_batches(model, batches, forward, (), lambda *_: None)
        return {name: one.cpu() for name, one in moments.items()}

    found = merged((processes or Processes()).gather(measure, long=True))
    known = {name: one for name, one in found.items() if bool(one.total.isfinite().all())}
    for name, one in known.items():
        means = one.means[0]
        _rebase(layers[name], means, (one.compute()[0] - means.square()).clamp(min=0))
    return len(known)


def _rebased(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers whose statistics, weight and bias are theirs alone, and are trained."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            uses[id(value)] = uses.get(id(value), 0) + 1
    names = {module: name for name, module in model.named_modules()}

    def is_own(norm: _BatchNorm) -> bool:
        held = [norm._parameters.get(name) for name in ("weight", "bias")]
        return norm.running_var is not None and all(
            value is not None and value.requires_grad and uses[id(value)] == 1 for value in held
        )

    return {names[norm]: norm for norm in batchnorm_layers(model) if is_own(norm)}


@contextmanager
def _measuring(layers: Mapping[str, _BatchNorm]) -> Iterator[dict[str, SecondMoments]]:
    """Measure what comes into some layers; of what is not finite the moments are NaN."""
    moments: dict[str, SecondMoments] = {}

    def see(name: str, inputs: Tensor) -> None:
        rows = inputs.detach().transpose(1, -1).reshape(1, -1, inputs.shape[1])
        made = SecondMoments(rows.shape[2], diagonal=True, sync_on_compute=False).to(rows.device)
        one = moments.setdefault(name, made)
        if bool(rows.isfinite().all()):
            one.update(rows)
        else:
            one.total.fill_(torch.nan)

    with ExitStack() as stack:
        for name, norm in layers.items():

            def tell(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], name: str = name) -> None:
                see(name, inputs[0] if inputs else named["input"])

            stack.callback(norm.register_forward_pre_hook(tell, with_kwargs=True).remove)
        yield moments


@torch.no_grad()
def _rebase(norm: _BatchNorm, means: Tensor, variances: Tensor) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    means, variances = means.to(mean.device), variances.to(mean.device)
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    norm.bias.add_((scale * (means - mean.double())).to(norm.bias))
    norm.weight.copy_(scale * (variances + norm.eps).sqrt())
    mean.copy_(means)
    variance.copy_(variances)
