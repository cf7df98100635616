"""Build: the layers that an allocation asks for, with weights, beside a model that is not changed.

Everything that can fail is done here (checks, decompositions, memory); :mod:`lr_callback.edits.surgery` only swaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lr_callback.common.parallel import Workers
from lr_callback.common.processes import Processes
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.factorization import Factorization
from lr_callback.edits.attached import copy_attributes, warn_of_attached
from lr_callback.layers import FactorizedLayer, dense_bias, weight_of
from lr_callback.layers.layer_types import build, dense_weight, layer_type
from lr_callback.mathematics.folding import Geometry, unfold_decoder, unfold_encoder
from lr_callback.mathematics.importance import Importance, checked_importance, weighted_fold
from lr_callback.mathematics.spectrum import split
from lr_callback.mathematics.truncation import truncate
from lr_callback.mathematics.weighting import diagonal_blocks, weighted_truncate
from lr_callback.model.find import find_layers
from lr_callback.units.latency import Progress

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def check_allocation(model: nn.Module, allocation: Allocation) -> dict[str, nn.Module]:
    """Return the layers of the model that an allocation names.

    Raises:
        TypeError: If it is not an allocation.
        ValueError: If one is missing, cannot be factorized, has another shape, or its slices do not divide it.
    """
    if not isinstance(allocation, Allocation):
        raise TypeError(f"`allocation` must be an Allocation, got {type(allocation).__name__}.")
    found = find_layers(model)
    missing = [name for name in allocation.layers if name not in found.layers]
    if missing:
        raise ValueError(
            f"The allocation is of another model: it names {_some(missing)}, this model has "
            f"{_some(list(found.layers)) or 'no layer that can be factorized'}. Nothing was changed."
        )
    for name, choice in allocation.layers.items():
        _check_layer(name, found.layers[name], allocation.shapes[name], choice)
    return {name: found.layers[name] for name in allocation.layers}


def _check_layer(name: str, layer: nn.Module, shape: tuple[int, ...], choice: Factorization | None) -> None:
    geometry = _geometry(layer)
    if geometry.weight_shape != tuple(shape):
        raise ValueError(
            f"{name}: the allocation is for a weight of shape {tuple(shape)}, this model's is "
            f"{geometry.weight_shape}. Nothing was changed."
        )
    if choice is None:
        return
    if choice.num_slices not in geometry.slice_counts():
        each = " of each group" if geometry.groups > 1 else ""
        wanted = f"divide the {geometry.weight_shape[1]} input channels{each}" if geometry.sliceable else "be 1"
        raise ValueError(f"{name}: `num_slices` must {wanted}, got {choice.num_slices}. Nothing was changed.")
    full = geometry.full_rank(choice.folding, choice.num_slices)
    if choice.rank > full:
        raise ValueError(
            f"{name}: `rank` must be at most {full}, the smaller side of a slice, got {choice.rank}. "
            "Nothing was changed."
        )


def _geometry(layer: nn.Module) -> Geometry:
    kind = layer_type(layer)
    assert kind is not None
    return kind.geometry(layer)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def build_layers(
    targets: Mapping[str, nn.Module],
    allocation: Allocation,
    crew: Workers,
    processes: Processes | None = None,
    importance: Mapping[str, Importance] | None = None,
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """Return the new form of each layer that is not yet as the allocation asks.

    Args:
        targets: as :func:`check_allocation` returned them.
        allocation: what each becomes.
        crew: where the decompositions are computed.
        processes: each decomposes a part of the layers, and all get the same factors, bit for bit; None: this one
            alone. Where bits differ between processes (the sign of a singular vector may), so would all that follows.
        importance: of the layers, where the allocation's error is weighted by it.
        progress: told of each layer.

    Raises:
        ValueError: If factors are not finite, or the importance is missing or not wanted.
        RuntimeError: If another process failed.
    """
    processes = processes or Processes()
    known, shrinkage = checked_importance(allocation.error, importance), allocation.method.get("shrinkage", 0.0)
    chosen = {name: allocation.layers[name] for name in targets}
    pending = [name for name, layer in targets.items() if not _is_as_chosen(layer, chosen[name])]
    owners = dict(zip(pending, processes.owners(_work(targets[name], chosen[name]) for name in pending), strict=True))

    def rebuild() -> dict[str, nn.Module]:
        if processes.rank == 0:
            warn_of_attached({name: weights_held(targets[name]) for name in pending})
        made: dict[str, nn.Module] = {}
        for done, (name, owner) in enumerate(owners.items()):
            if progress is not None:
                progress(done, len(owners), name)
            own = crew if owner == processes.rank else None
            made[name] = _rebuild(name, targets[name], chosen[name], own, known.get(name), shrinkage)
        return made

    made = processes.agree(rebuild, long=True)
    for name, layer in made.items():
        processes.send(weights_held(layer), owners[name])
    return made


def _work(layer: nn.Module, choice: Factorization | None) -> float:
    return _geometry(layer).work(() if choice is None else (choice.num_slices,))


def _is_as_chosen(layer: nn.Module, choice: Factorization | None) -> bool:
    if choice is None or not isinstance(layer, FactorizedLayer):
        return choice is None and not isinstance(layer, FactorizedLayer)
    return layer.structure == (choice.folding, choice.num_slices, choice.rank)


def _rebuild(
    name: str,
    layer: nn.Module,
    choice: Factorization | None,
    crew: Workers | None,
    importance: Importance | None,
    shrinkage: float,
) -> nn.Module:
    """Return the layer as chosen; without a crew its factors are not set, another process has them."""
    if choice is None:
        assert isinstance(layer, FactorizedLayer)
        return densified(layer)
    made = skeleton(layer, choice)
    if crew is None:
        return made
    made.set_factors(*factors(dense_weight(layer), made.geometry(made), choice, crew, importance, shrinkage))
    if not bool(torch.stack([torch.isfinite(factor).all() for factor in made.factors]).all()):
        raise ValueError(
            f"{name}: the factors must be finite, found NaN or infinity in those of rank {choice.rank} in "
            f"{made.factors[0].dtype}. Exclude the layer, or train in a dtype of a larger range. Nothing was changed."
        )
    return made


def factors(
    weight: Tensor,
    geometry: Geometry,
    choice: Factorization,
    crew: Workers,
    importance: Importance | None = None,
    shrinkage: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the encoder's and the decoder's weight of a dense weight, float64, in the order of axes of ``folding``.

    Args:
        weight: ``(F, C / g, *kernel)``.
        geometry: of the layer.
        choice: what it becomes.
        crew: where the decompositions are computed.
        importance: of its inputs and outputs, by which the error is weighted; None: all count the same.
        shrinkage: of the method, see :meth:`Importance.shrunk`.
    """
    folding, num_slices, importance = choice.folding, choice.num_slices, (importance or Importance()).shrunk(shrinkage)
    matrix, moments = weighted_fold(weight, folding, geometry, importance)
    slices, rows = split(matrix, num_slices), importance.of_rows(geometry, folding)
    if moments is None:
        left, right = truncate(slices, choice.rank, crew)
    else:
        left, right = weighted_truncate(slices, choice.rank, diagonal_blocks(moments, num_slices), crew)
    if rows is not None:
        left = left / rows.to(left.device).repeat_interleave(num_slices, dim=0)
    return unfold_encoder(right, geometry, folding), unfold_decoder(left, geometry, folding)


def skeleton(layer: nn.Module, choice: Factorization) -> FactorizedLayer:
    """Return the factorized form of a layer with its bias, mode and hooks, but weights that are not set."""
    with torch.inference_mode(False):
        made = build(layer, choice)
    _take_over(made, made.decoder, layer, made.factors)
    return made


def dense_skeleton(layer: FactorizedLayer) -> nn.Module:
    """Return the dense form of a layer with its bias, mode and hooks, but a weight that is not set."""
    with torch.inference_mode(False):
        made = layer.dense_skeleton()
    _take_over(made, made, layer, (weight_of(made),))
    return made


def densified(layer: FactorizedLayer) -> nn.Module:
    """Return the dense form of a layer, the factors multiplied back."""
    made = dense_skeleton(layer)
    with torch.no_grad():
        weight_of(made).copy_(layer.weight)
    return made


def _take_over(made: nn.Module, owner: nn.Module, layer: nn.Module, weights: Sequence[nn.Parameter]) -> None:
    """Give a new layer what the old one has besides its weight; the bias stays the same parameter.

    Attributes that users set on a layer or on its weight, as marks for an optimizer or an initialization, come along.
    """
    old = weights_held(layer)[0]
    for weight in weights:
        weight.requires_grad_(old.requires_grad)
    copy_attributes(old, weights)
    if "bias" in owner._parameters:
        owner._parameters["bias"] = dense_bias(layer)
    hand_over(layer, made)


def hand_over(layer: nn.Module, made: nn.Module) -> None:
    """Give a module that takes another's place its mode, its hooks, and the attributes that users set on it."""
    made.train(layer.training)
    for hooks in _HOOKS:
        # The same dict: handles that users hold still remove their hooks.
        setattr(made, hooks, getattr(layer, hooks))
    for name in vars(layer).keys() - _declared(layer) - vars(made).keys():
        setattr(made, name, vars(layer)[name])


def _declared(layer: nn.Module) -> set[str]:
    """Return the attributes that a layer has as one of its type; whatever else it has the user gave it."""
    annotated = (name for base in type(layer).__mro__ for name in vars(base).get("__annotations__", ()))
    own = type(layer).own_attributes() if isinstance(layer, FactorizedLayer) else ()
    return {*annotated, *vars(nn.Module()), *own}


def weights_held(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return a dense layer's weight, or a factorized one's two factors."""
    return layer.factors if isinstance(layer, FactorizedLayer) else (weight_of(layer),)
