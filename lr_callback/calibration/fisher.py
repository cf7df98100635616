"""Fisher: how much each entry of a layer's weight counts, by the mean squares of its gradients.

To second order a change ``e`` of a weight changes the loss by about ``sum_ij v_ij e_ij^2 / 2``, ``v_ij`` the mean
squared gradient of the entry: the diagonal of the empirical Fisher information. The low-rank matrix that is best for
weights of single entries has no closed form (Srebro, Jaakkola, "Weighted low-rank approximations", ICML 2003), the one
for weights ``v_ij = r_i c_j`` has. So ``v`` is taken for its sums of rows times its sums of columns over the sum of
all, the form in which Adafactor keeps it (arXiv 1804.04235): of all products it has the smallest generalized
Kullback-Leibler divergence, and it is ``v`` itself where that is of rank one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Optimizer, Rprop

from lr_callback.common.processes import Processes, by_name
from lr_callback.common.untouched import as_written, untouched
from lr_callback.edits.build import densified, weights_held
from lr_callback.edits.optimizers import with_inner
from lr_callback.edits.surgery import standing_in
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_type
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers

Batch = TypeVar("Batch")

STATES = ("exp_avg_sq", "square_avg")
"""What optimizers call the mean squares of gradients: Adam and its kin, RMSprop."""

WITHOUT = (SGD, ASGD, Adagrad, Rprop, LBFGS)
"""Optimizers (exactly, not a subclass) that are known to keep none, or none that can be had."""

_Sums = tuple[Tensor, Tensor]
"""Sums of mean squared gradients over each group's rows ``(g, F / g)`` and columns ``(g, C / g * prod(kernel))``."""


def fisher_importance(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    *,
    optimizers: Iterable[Optimizer] | Optimizer = (),
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    processes: Processes | None = None,
) -> dict[str, Importance]:
    """Measure the mean squared gradients of the layers' weights, for ``error="fisher"``.

    Either on batches, in eval mode; or as the optimizers of a training have kept them, which takes no time.

    Args:
        model: on the device of the batches; is not changed.
        batches: of the training.
        loss: of the model on a batch, a scalar; gradients of one batch are squared as a whole, so that batches of one
            give the Fisher information itself, and larger ones less of what differs between examples.
        optimizers: that have trained the model, in place of batches and loss: Adam and its kin, or RMSprop.
        include: glob patterns of layer names; only these are measured. None: all.
        exclude: glob patterns of layer names that are left out.
        processes: of a distributed run, each with batches of its own; all get the means over all batches. Of states of
            optimizers each layer's is that of the first process that has it.

    Returns:
        Layer name -> weights of its inputs and outputs, whose products are in proportion to the mean squares, as nearly
        as products can be. Layers without gradients have none. States of optimizers are of the factors of a factorized
        layer: there the rows are those of its decoder, the columns those of its encoder.

    Memory: that of a backward pass; sums of rows and columns alone are kept.

    Raises:
        ValueError: If there are neither batches with a loss nor optimizers, or both; if no layer has a gradient or an
            optimizer's mean squares; or if these are not finite (the layer is named).
        RuntimeError: If another process failed.

    Example::

        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = fisher_importance(model, [torch.randn(16, 3)], lambda model, batch: model(batch).square().mean())
        >>> found["0"].inputs.shape, found["0"].outputs.shape
        (torch.Size([1, 3]), torch.Size([8]))
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    layers, processes = find_layers(model, include, exclude).layers, processes or Processes()
    if batches is not None and loss is not None and not listed:
        parts = processes.gather(lambda: _of_batches(model, layers, batches, loss), long=True)
        return _importance(parts, "a gradient: the loss does not depend on them, or it is flat")
    if batches is None and loss is None and listed:
        own = processes.gather(lambda: _of_states(layers, listed), long=True)
        seen = [{name: sums for part in reversed(own) for name, sums in part.items()}]
        names = ", ".join(dict.fromkeys(type(one).__name__ for one in listed))
        return _importance(
            seen,
            f"mean squared gradients in the state of the optimizers ({names}): Adam, AdamW and RMSprop keep them from "
            "their first step on",
        )
    raise ValueError(
        "fisher_importance: takes either `batches` and a `loss(model, batch)`, or the `optimizers` of a training; got "
        f"batches={batches is not None}, loss={loss is not None}, {len(listed)} optimizer(s)."
    )


def _of_batches(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> dict[str, _Sums]:
    """Add up squared gradients, of factorized layers those of the dense weight that they stand for."""
    dense: dict[nn.Module, nn.Module]
    dense = {layer: densified(layer) for layer in layers.values() if isinstance(layer, FactorizedLayer)}
    owners = {name: dense.get(layer, layer) for name, layer in layers.items()}
    weights = [weights_held(layer)[0] for layer in owners.values()]
    asked = [weight.requires_grad for weight in weights]
    sums: dict[str, _Sums] = {}
    count = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with untouched(model), as_written(), standing_in(model, dense), torch.enable_grad():
            for module in dense.values():
                module.eval()
            for batch in batches:
                value = _checked_loss(loss(model, batch))
                found = torch.autograd.grad(value, weights, allow_unused=True)
                for (name, layer), gradient in zip(owners.items(), found, strict=True):
                    _add(sums, name, layer, gradient)
                count += 1
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
    if not count:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return sums


def _checked_loss(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"`loss(model, batch)` must return a scalar tensor with a gradient, got {what}. Do not detach it, and "
            "compute it without torch.no_grad()."
        )
    return value


def _add(sums: dict[str, _Sums], name: str, layer: nn.Module, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    rows, columns = _sums(layer, dense.detach().double().square())
    before = sums.get(name)
    sums[name] = (rows, columns) if before is None else (before[0] + rows, before[1] + columns)


def _of_states(layers: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, _Sums]:
    """Read the mean squares that optimizers keep of the layers' weights."""
    found: dict[str, _Sums] = {}
    every = with_inner(optimizers)
    for name, layer in layers.items():
        squares = [_squares(every, weight) for weight in weights_held(layer)]
        known = [one for one in squares if one is not None]
        if len(known) == len(squares):
            found[name] = (
                _sums_of_factors(layer, *known) if isinstance(layer, FactorizedLayer) else _sums(layer, *known)
            )
    return found


def _squares(optimizers: Sequence[Optimizer], weight: nn.Parameter) -> Tensor | None:
    """Return the mean squared gradients of one parameter that an optimizer keeps, None if none does."""
    states = [one.state[weight] for one in optimizers if weight in one.state]
    kept = [state[key] for state in states for key in STATES if isinstance(state.get(key), Tensor)]
    usable = [one.detach().double() for one in kept if one.shape == weight.shape]
    return usable[0] if usable else None


def _sums(layer: nn.Module, squares: Tensor) -> _Sums:
    """Return the sums over rows and columns of what is shaped as a dense layer's weight, on the CPU."""
    kind = layer_type(layer)
    assert kind is not None
    groups = kind.geometry(layer).groups
    ordered = kind.relaid("dense", squares, groups)
    matrices = ordered.reshape(groups, ordered.shape[0] // groups, -1)
    return matrices.sum(2).cpu(), matrices.sum(1).cpu()


def _sums_of_factors(layer: FactorizedLayer, encoder: Tensor, decoder: Tensor) -> _Sums:
    """Return sums over rows and columns as the gradients of factors show them, the same at each kernel position.

    Of the dense gradient ``G`` of a slice the decoder has ``G E^T`` and the encoder ``D^T G``: its rows and its
    columns, as far as the factors reach. For gradients of rank one they are in proportion to those of ``G``; columns of
    different slices are as large as their decoders, by whose squared norms they are divided.
    """
    groups, slices = layer.geometry(layer).groups, layer.num_slices
    encoder, decoder = layer.in_own_order(encoder, decoder)
    tiny = torch.finfo(encoder.dtype).tiny
    sizes = layer.ordered_factors[1].detach().double().square()
    sizes = sizes.reshape(groups, -1, slices, layer.rank, sizes[0, 0].numel()).sum((1, 3, 4)).clamp(min=tiny)
    columns = encoder.reshape(groups, slices, layer.rank, encoder.shape[1], -1).sum((2, 4)) / sizes[..., None]
    columns = columns.flatten(1)
    rows = decoder.flatten(1).sum(1).reshape(groups, -1)
    scale = rows.sum(1, keepdim=True) / columns.sum(1, keepdim=True).clamp(min=tiny)
    return rows.cpu(), (scale * columns).cpu()


def _importance(parts: Sequence[Mapping[str, _Sums]], what: str) -> dict[str, Importance]:
    """Turn the sums of several processes, in the order of their ranks, into weights of inputs and outputs."""
    found: dict[str, Importance] = {}
    for name, held in by_name(parts).items():
        rows, columns = (torch.stack(list(side)).sum(0) for side in zip(*held, strict=True))
        totals = rows.sum(1, keepdim=True)
        if bool((totals == 0).all()):
            continue
        try:
            inputs = columns / totals.clamp(min=torch.finfo(totals.dtype).tiny)
            found[name] = Importance(inputs=inputs, outputs=rows.flatten())
        except ValueError as error:
            raise ValueError(f"{name}: its gradients cannot weigh it. {error}") from error
    if not found:
        raise ValueError(f"error='fisher' weighs layers by squared gradients, and no layer has {what}.")
    return found
