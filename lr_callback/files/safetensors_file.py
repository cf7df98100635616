"""Safetensors: a state dict and notes about it in one file that holds tensors and text, nothing that could be run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

_LENGTH = 8
"""Bytes of the header's length, with which a file begins."""


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as one of safetensors does: the length of a JSON object, then the object.

    Args:
        path: of an existing file.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH + 1)
    length = int.from_bytes(start[:_LENGTH], "little")
    return path.suffix == ".safetensors" or (start[_LENGTH:] == b"{" and length <= path.stat().st_size - _LENGTH)


def write_safetensors(path: Path, state: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write a state dict; what stands in it under several names is written once.

    The other names go into the file's notes, as ``safetensors.torch.save_model`` has it, so that its ``load_model``
    reads the file too.

    Args:
        path: of the file.
        state: name -> tensor, on any device, of any memory format.
        notes: name -> text, for the file's header.

    Raises:
        ValueError: If an entry is not a tensor, or of a class that computes for itself.
    """
    first: dict[object, str] = {}
    others: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or is_composed(value):
            raise ValueError(
                f"{name}: a safetensors file holds plain tensors alone, found {type(value).__name__} in the state "
                "dict. Export to another format, or keep it in the code of the model. Nothing was written."
            )
        kept = first.setdefault(_place(name, value), name)
        if kept != name:
            others[name] = kept
    tensors = {name: _plain(value) for name, value in state.items() if name not in others}
    import_module("safetensors.torch").save_file(tensors, str(path), {"format": "pt", **others, **notes})


def is_composed(value: Tensor) -> bool:
    """Return whether a tensor is of a class that computes for itself, as quantized and sharded ones do.

    Example::

        >>> is_composed(torch.ones(2)), is_composed(torch.nn.Parameter(torch.ones(2)))
        (False, False)
    """
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _place(name: str, value: Tensor) -> object:
    """Return what is the same for two names of one tensor, and for no others."""
    if not value.numel():
        return name
    return value.data_ptr(), value.device, value.dtype, tuple(value.shape), value.stride()


def _plain(value: Tensor) -> Tensor:
    """Return a tensor on the CPU whose memory is its own and in the order of its axes."""
    plain = value.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, under all of its names, on the CPU.

    Args:
        path: of the file.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If the file is damaged.
    """
    return read_with_notes(path)[0]


def read_with_notes(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read what :func:`read_safetensors` does, and the notes in the file's header: name -> text; raises as it does."""
    try:
        package = import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name}: to read it the package safetensors must be installed, and it was not found; "
            "install it with: pip install 'lr_callback[export]'. Nothing was changed."
        ) from error
    try:
        with package.safe_open(str(path), framework="pt") as file:
            notes: Mapping[str, str] = file.metadata() or {}
            names: list[str] = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except package.SafetensorError as error:
        raise ValueError(
            f"{path.name}: must be a whole file of safetensors; it may be cut off ({error}). Nothing was changed."
        ) from error
    others = {name: tensors[kept] for name, kept in notes.items() if kept in tensors and name not in tensors}
    return tensors | others, notes


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts hold the same names and bits, wherever and however they lie in memory."""
    return one.keys() == other.keys() and all(_same_bits(value, other[name]) for name, value in one.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().cpu(), other.detach().cpu()
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))
