"""Checkpoints: give a model the structure that a file was written with, in both directions, then its weights.

The structure is read from the names and shapes in the state dict itself: ``<layer>.encoder.weight`` where the model has
a dense ``<layer>`` means factorized, with the number of slices and the rank in the shapes; ``<layer>.weight`` where the
model has a factorized one means dense. So files that hold weights alone are enough. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.factorization import Factorization
from lr_callback.edits.build import dense_skeleton, skeleton
from lr_callback.edits.surgery import factorize_, replace_layers
from lr_callback.files.names import ENTRIES, is_extra, naming
from lr_callback.files.noted import check_noted, noted_allocation
from lr_callback.files.source import check_tied, check_values, load, state_dict_of, warn_of_broken
from lr_callback.files.values import check_has_values, check_writable, keep_values, load_values
from lr_callback.layers import FactorizedLayer, dense_bias
from lr_callback.layers.base import any_weight
from lr_callback.layers.layer_types import layer_cost, layer_type
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.model.find import find_layers


def restore_(model: nn.Module, source: Allocation | Mapping[str, Any] | str | Path) -> None:
    """Give a model the structure of a source, in place, and its weights where the source has them.

    Args:
        model: dense or factorized, on any device; it keeps the device and dtype of each layer.
        source: an :class:`~lr_callback.Allocation`, its dict, its JSON text, a path of its JSON
            file; or a Lightning checkpoint or a state dict, as a path or as the loaded dict. A checkpoint of a
            LightningModule may be restored into the network inside it. Files are read with ``weights_only=True``, and
            those of safetensors as what they are.

    Without weights in the source (an allocation) the model's own weights are factorized. Weights that are NaN or
    infinite in the source are loaded as they are, with a warning that names them.

    Raises:
        FileNotFoundError: If the path does not exist.
        TypeError: If the source is of another type.
        ValueError: If the source is not one of these, is damaged, is of another model, has an allocation beside its
            weights that is not theirs, has values that the model's dtype does not reach or has only as others, or two
            that differ for one tensor of the model; or if a tensor of the model cannot be written. Nothing was changed.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> fresh = nn.Sequential(nn.Linear(64, 64))
        >>> restore_(fresh, {"state_dict": model.state_dict()})
        >>> bool((fresh[0].weight == model[0].weight).all())
        True
    """
    loaded = load(source)
    if isinstance(loaded, Allocation):
        factorize_(model, _renamed(model, loaded))
        return
    entries, layers = state_dict_of(loaded), _names_of_layers(model)
    check_has_values(model)
    names = naming(model, layers, entries)
    state = names.entries(entries)
    factors = {f"{name}.{one}": any_weight(layer) for layer in layers for name in layers[layer] for one in ENTRIES}
    own = {**factors, **model.state_dict(keep_vars=True)}
    check_values(own, state)
    check_weights(model, state)
    _check_notes(loaded, layers, state, names.prefix)
    check_tied(filter(None, names.groups(state)), own, state)
    warn_of_broken({name for name, value in own.items() if isinstance(value, nn.Parameter)}, state)
    versions = names.of_modules(getattr(loaded.get("state_dict", loaded), "_metadata", None) or {})
    _load(model, state, versions)


def _check_notes(
    loaded: Mapping[str, Any], layers: Mapping[nn.Module, Sequence[str]], state: Mapping[str, Tensor], prefix: str
) -> None:
    """Compare the allocation that a file may have beside its weights with the structure of these."""
    noted = noted_allocation(loaded)
    if noted is None:
        return
    choices = ((names, _structure_in(state, f"{names[0]}.", names[0], layer)) for layer, names in layers.items())
    structure = [(names, None if one is None else (one.num_slices, one.rank)) for names, one in choices]
    check_noted(noted, structure, prefix)


def _renamed(model: nn.Module, allocation: Allocation) -> Allocation:
    """Give an allocation's layers the names that a model has for them."""
    names = naming(model, {}, ())
    return replace(allocation, layers=names.of_modules(allocation.layers), shapes=names.of_modules(allocation.shapes))


def _load(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, object]) -> None:
    """Swap the layers and load the weights; put back both if a module does not take its part."""
    with ExitStack() as undo:
        named = keep_values(model, undo)
        adapt_structure(model, state, undo=undo)
        left = set(map(id, model.state_dict(keep_vars=True).values()))
        check_writable({name: value for name, value in named.items() if id(value) in left})
        load_values(model, state, versions)
        undo.pop_all()


def _names_of_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all names of each layer that can be factorized; a shared one has several."""
    names: dict[nn.Module, list[str]] = {layer: [] for layer in find_layers(model).layers.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)
    return names


def adapt_structure(
    model: nn.Module, state: Mapping[str, Tensor], prefix: str = "", undo: ExitStack | None = None
) -> None:
    """Give each layer of a model the structure that a state dict has for it; weights are not set.

    Args:
        model: whose layers are replaced.
        state: names and shapes.
        prefix: of the model's names in it.
        undo: given what undoes it, see :func:`~lr_callback.edits.surgery.replace_layers`.

    Raises:
        ValueError: If the factors in the state dict do not fit the layer. Nothing was changed.
    """
    made = restructured(model, state, prefix)
    if made:
        replace_layers(model, made, undo=undo)


def restructured(model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> dict[str, nn.Module]:
    """Return, for each layer that a state dict has in another structure, one of that structure without weights."""
    made: dict[str, nn.Module] = {}
    for name, layer in find_layers(model).layers.items():
        choice = _structure_in(state, f"{prefix}{name}.", name, layer)
        if choice is None and isinstance(layer, FactorizedLayer) and f"{prefix}{name}.weight" in state:
            made[name] = dense_skeleton(layer)
        elif choice is not None and not _is_like(layer, choice):
            made[name] = skeleton(layer, choice)
    return made


def _is_like(layer: nn.Module, choice: Factorization) -> bool:
    """Return whether a layer's factors have the shapes of a choice, whose folding may be another of the same shapes."""
    kind = layer_type(layer)
    if kind is None or not isinstance(layer, FactorizedLayer):
        return False
    kernel = kind.geometry(layer).decoder_kernel
    same_sizes = (layer.num_slices, layer.rank) == (choice.num_slices, choice.rank)
    return same_sizes and kernel(layer.folding) == kernel(choice.folding)


def _structure_in(state: Mapping[str, Tensor], prefix: str, name: str, layer: nn.Module) -> Factorization | None:
    """Read a layer's structure off the shapes of its factors; None if the state dict has none."""
    encoder, decoder = state.get(f"{prefix}encoder.weight"), state.get(f"{prefix}decoder.weight")
    kind = layer_type(layer)
    if encoder is None or decoder is None or kind is None:
        return None
    choice = _fitting(kind, layer, tuple(encoder.shape), tuple(decoder.shape))
    if choice is None:
        geometry = kind.geometry(layer)
        shape = kind.relaid_shape("dense", geometry.weight_shape, geometry.groups)
        raise ValueError(
            f"{name}: the factors in the state dict must multiply to a weight of shape {shape}, found "
            f"an encoder of {tuple(encoder.shape)} and a decoder of {tuple(decoder.shape)}; "
            "the file is of another model, or damaged. Nothing was changed."
        )
    return choice


def _fitting(
    kind: type[FactorizedLayer], layer: nn.Module, encoder: tuple[int, ...], decoder: tuple[int, ...]
) -> Factorization | None:
    """Return the structure whose factors have these shapes, None if there is none."""
    geometry = kind.geometry(layer)
    if len(decoder) != len(geometry.weight_shape):
        return None
    width = kind.relaid_shape("decoder", decoder, geometry.groups)[1]  # of a group: slices times rank
    for folding in layer_cost(layer).distinct_foldings(FOLDINGS):
        for num_slices in geometry.slice_counts(width):
            choice = Factorization(folding, num_slices, width // num_slices, 0.0, 0, 0)
            if width % num_slices == 0 and _factor_shapes(kind, layer, choice) == (encoder, decoder):
                return choice
    return None


def _factor_shapes(
    kind: type[FactorizedLayer], layer: nn.Module, choice: Factorization
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of encoder and decoder in a structure, as the layer's type holds them."""
    geometry = kind.geometry(layer)
    encoder, decoder = geometry.factor_shapes(choice.folding, choice.num_slices, choice.rank)
    of_encoder = kind.relaid_shape("encoder", encoder, geometry.groups * choice.num_slices)
    return of_encoder, kind.relaid_shape("decoder", decoder, geometry.groups)


def check_weights(model: nn.Module, state: Mapping[str, Tensor], partial: bool = False) -> None:
    """Refuse a state dict that would not load after the structure was adapted; ``partial``: names may be missing."""
    own = {name: value for name, value in model.state_dict().items() if not is_extra(name)}
    expected = {name: _shape(value, state.get(name)) for name, value in own.items()}
    for layer, names in _names_of_layers(model).items():
        shapes = _shapes_in(layer, _structure_in(state, f"{names[0]}.", names[0], layer))
        for name in names:
            for inner in ENTRIES:
                expected.pop(f"{name}.{inner}", None)
            expected.update({f"{name}.{inner}": shape for inner, shape in shapes.items()})
    found = {name: tuple(value.shape) for name, value in state.items() if not is_extra(name)}
    if partial:
        common = expected.keys() & found.keys()
        expected, found = ({name: shapes[name] for name in shapes if name in common} for shapes in (expected, found))
    if expected != found:
        raise ValueError(_differences(expected, found, find_layers(model).skipped))


def _shape(own: Tensor, given: Tensor | None) -> tuple[int, ...]:
    """Return the shape that an entry must have; one that is not initialised yet takes the shape that it is given."""
    if not is_lazy(own):
        return tuple(own.shape)
    return () if given is None else tuple(given.shape)


def _shapes_in(layer: nn.Module, choice: Factorization | None) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what a layer holds in a structure; None: dense."""
    kind = layer_type(layer)
    assert kind is not None
    geometry = kind.geometry(layer)
    bias = {} if dense_bias(layer) is None else {"bias": (geometry.out_channels,)}
    if choice is None:
        return {"weight": kind.relaid_shape("dense", geometry.weight_shape, geometry.groups), **bias}
    encoder, decoder = _factor_shapes(kind, layer, choice)
    return {
        "encoder.weight": encoder,
        "decoder.weight": decoder,
        **{f"decoder.{name}": shape for name, shape in bias.items()},
    }


def _of(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "nothing"


def _differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], skipped: Mapping[str, str]
) -> str:
    every = expected.keys() | found.keys()
    names = sorted(name for name in every if expected.get(name) != found.get(name))
    lines = [f"{name}: {_of(expected, name)} in the model, {_of(found, name)} in the file" for name in names]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    dense = [layer for layer in skipped if f"{layer}.encoder.weight" in names]
    why = "".join(f" {layer} can only be dense here: {skipped[layer]}." for layer in dense[:2])
    return (
        f"`source`: its weights must be of this model, {len(lines)} of {len(every)} names or shapes differ: "
        f"{'; '.join(lines[:4])}{more}.{why} Give the model that the file is of, made with the same arguments. "
        "Nothing was changed."
    )
