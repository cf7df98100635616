"""Noted: the allocation that a file has beside its weights, compared with what the weights themselves say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lr_callback.common.table import listed, readable
from lr_callback.decisions.allocation import Allocation

_Sizes = tuple[int, int] | None
"""Slices and rank of a layer; None: it is dense."""

Structure = Sequence[tuple[Sequence[str], _Sizes]]
"""Of each layer that can be factorized: its names, and what it is."""


def noted_allocation(loaded: Mapping[str, Any]) -> Allocation | None:
    """Return the allocation in the dict of a file, under ``allocation`` beside its ``state_dict``; None if none is.

    Raises:
        ValueError: If it cannot be read.
    """
    found = loaded.get("allocation") if "state_dict" in loaded else None
    if isinstance(found, str) and found.lstrip().startswith("{"):
        return Allocation.from_json(found)
    return Allocation.from_dict(found) if isinstance(found, Mapping) and "layers" in found else None


def check_noted(allocation: Allocation, structure: Structure, prefix: str) -> None:
    """Refuse a file whose allocation is not that of its weights; warn of one with names that are not the file's.

    Args:
        allocation: in the file.
        structure: of the layers that the file has weights of, as these have it.
        prefix: of their names in the file, with a dot.

    Raises:
        ValueError: If it says something else about a layer than the weights do.
    """
    places = [(prefix, ""), *_places(allocation, structure)]
    differing = [_differing(_under(allocation, *place), structure) for place in places]
    if not all(differing):
        return
    own = {readable(name) for names, _ in structure for name in names}
    if own & _under(allocation, prefix, "").keys():
        name, noted, found = differing[0][0]
        raise ValueError(
            f"`source`: the allocation in the file must be that of its weights, they differ at {len(differing[0])} "
            f"layers: {name} is {_told(noted)} in the allocation and {_told(found)} in the weights; the file was put "
            "together from two, or changed. Write it again, or take the allocation out. Nothing was changed."
        )
    warnings.warn(
        f"`source`: the allocation in the file should name its layers, found {listed(list(allocation.layers))}; the "
        f"weights have {listed(sorted(own)) or 'none that can be factorized'}. The structure is that of the weights.",
        stacklevel=4,
    )


def in_the_names_of(allocation: Allocation, structure: Structure) -> Allocation | None:
    """Return an allocation under a model's names for its layers; None if it is of other layers, or of more.

    Args:
        allocation: under names that may have a prefix more, or less.
        structure: of the model.
    """
    names = {readable(name): name for names, _ in structure for name in names}
    for prefix, more in _places(allocation, structure):
        if _differing(_under(allocation, prefix, more), structure):
            continue
        every = [*allocation.layers, *allocation.skipped]
        if all(readable(name).startswith(prefix) for name in every):
            own = {name: more + readable(name).removeprefix(prefix) for name in every}
            own = {name: names.get(new, new) for name, new in own.items()}
            return replace(
                allocation,
                layers={own[name]: layer for name, layer in allocation.layers.items()},
                skipped={own[name]: reason for name, reason in allocation.skipped.items()},
                shapes={own[name]: shape for name, shape in allocation.shapes.items()},
            )
    return None


def _places(allocation: Allocation, structure: Structure) -> Iterator[tuple[str, str]]:
    """Yield what may be before all names in an allocation and not in a model, and the other way round."""
    yield "", ""
    noted = [readable(name) for name in allocation.factorized]
    own = [readable(name) for names, found in structure for name in names if found is not None]
    yield from ((name.removesuffix(own[0]), "") for name in noted if own and name.endswith(f".{own[0]}"))
    yield from (("", name.removesuffix(noted[0])) for name in own if noted and name.endswith(f".{noted[0]}"))


def _under(allocation: Allocation, prefix: str, more: str) -> dict[str, _Sizes]:
    """Return the slices and rank of the layers whose names begin with a prefix, with another one in its place."""
    layers = {readable(name): choice for name, choice in allocation.layers.items()}
    return {
        more + name.removeprefix(prefix): None if choice is None else (choice.num_slices, choice.rank)
        for name, choice in layers.items()
        if name.startswith(prefix)
    }


def _differing(noted: Mapping[str, _Sizes], structure: Structure) -> list[tuple[str, _Sizes, _Sizes]]:
    """Return the layers of which an allocation says something else than the weights: name, what each says."""
    left = {name: sizes for name, sizes in noted.items() if sizes is not None}
    differing: list[tuple[str, _Sizes, _Sizes]] = []
    for names, found in structure:
        said = [sizes for name in names if (sizes := left.pop(readable(name), None)) is not None]
        if said != ([] if found is None else [found]):
            differing.append((names[0], said[0] if said else None, found))
    return [*differing, *((name, sizes, None) for name, sizes in left.items())]


def _told(sizes: _Sizes) -> str:
    return "dense" if sizes is None else f"of {sizes[0]} slices and rank {sizes[1]}"
