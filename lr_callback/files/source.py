"""Sources: what a model can be restored from, read without unpickling anything."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lr_callback.decisions.allocation import Allocation
from lr_callback.files.names import is_extra
from lr_callback.files.safetensors_file import is_composed, is_safetensors, read_with_notes

_NOT_PLAIN = re.compile(r"GLOBAL (\S+) was not an allowed global")
_SAVED = (b"PK", b"\x80")
"""How files of ``torch.save`` begin: an archive, or, before torch 1.6, a pickle."""
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_TRUSTED = "If you trust the file, load it yourself: restore_(model, torch.load(path, weights_only=False))."
_WHOLE = (torch.bool, *_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def load(
    source: Allocation | Mapping[str, Any] | str | Path, unpickled: str = _TRUSTED
) -> Allocation | Mapping[str, Any]:
    """Return the allocation, or the dict of a checkpoint, that a source is.

    Args:
        source: see :func:`lr_callback.restore_`.
        unpickled: what to do about a file that cannot be read without unpickling objects, for the text of an error.

    Raises:
        TypeError: If it is of none of the types of :func:`lr_callback.restore_`.
        FileNotFoundError: If the path does not exist.
        ValueError: If the allocation or the file cannot be read.
    """
    if isinstance(source, Allocation):
        return source
    if isinstance(source, Mapping):
        is_allocation = "version" in source and "layers" in source
        return Allocation.from_dict(source) if is_allocation else source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return Allocation.from_json(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"`source` must be an Allocation, a dict, JSON text or a path, got {type(source).__name__}. "
            "Nothing was changed."
        )
    path = Path(source)
    if not _is_file(path):
        raise FileNotFoundError(
            f"{str(path)[:200]}: no such file; `source` must be an allocation, JSON text, a dict or a path."
        )
    if is_safetensors(path):
        state, notes = read_with_notes(path)
        return {"state_dict": state, "allocation": notes.get("allocation")}
    with path.open("rb") as file:
        is_text = file.read(64).lstrip().startswith(b"{")
    return Allocation.from_json(path) if is_text or path.suffix == ".json" else read_checkpoint(path, unpickled)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no path at all: too long, or with a zero byte
        return False


def read_checkpoint(path: Path, unpickled: str = _TRUSTED) -> Mapping[str, Any]:
    """Read a file of ``torch.save`` without unpickling objects, on the CPU.

    Raises:
        ValueError: If the file is cut off, is not of ``torch.save``, or holds other things than plain data and tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged file
        check_kind(path)
        raise ValueError(
            f"{path.name}: must be a checkpoint that torch.load(weights_only=True) reads; it may be cut off or hold "
            f"objects other than tensors and plain data ({type(error).__name__}: {_why(error)}). "
            f"{unpickled} Nothing was changed."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path.name}: must hold a dict, found {type(loaded).__name__}. Nothing was changed.")
    return loaded


def _why(error: Exception) -> str:
    """Return why torch reads no file: the class of what it does not make, else the first line of what it says.

    Not its advice, to unpickle the file all the same.
    """
    text = str(error)
    found = _NOT_PLAIN.search(text)
    reason = text.partition("WeightsUnpickler error: ")[2].strip() or text
    return f"it holds {found[1]}" if found else reason.partition("\n")[0]


def check_kind(path: Path, option: str = "") -> None:
    """Refuse a file that begins as none of ``torch.save`` does.

    Args:
        path: of a file that is there.
        option: of a command line, that names it, for the text of the error.

    Raises:
        ValueError: If it is another kind of file, as a text.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_SAVED):
        return
    named = f"{option} {path}" if option else path.name
    found = "an empty file" if not start else "another kind of file" if b"\0" in start else "a text"
    raise ValueError(
        f"{named}: must be a checkpoint, as ModelCheckpoint or torch.save writes it, found {found}; give "
        "the checkpoint of a run, or a file of weights. Nothing was changed."
    )


def state_dict_of(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint's dict, which may be one itself.

    Raises:
        ValueError: If there is none.
    """
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, Mapping) or not state or not all(map(_is_entry, state.items())):
        raise ValueError(
            "`source`: must be an allocation, a Lightning checkpoint or a state dict of tensors, found a dict with the "
            f"keys {sorted(map(str, loaded))[:6]}. Nothing was changed."
        )
    return dict(state)


def _is_entry(entry: tuple[object, object]) -> bool:
    name, value = entry
    return isinstance(name, str) and (isinstance(value, Tensor) or is_extra(name))


def check_values(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse values that torch would stop at in the middle of loading, or convert to something else.

    Args:
        own: name -> what the model has there, or has in another structure.
        state: that is to be loaded.

    Raises:
        ValueError: If a value is not a plain tensor with values, is not floating point where the model's is, is finite
            and beyond the largest number of the model's dtype, or is another number in the model's whole ones.
    """
    for name, value in state.items():
        reason = None if is_extra(name) else _misfit(own.get(name), value)
        if reason is not None:
            raise ValueError(f"`source`: {name} must be {reason}. Nothing was changed.")


def _misfit(own: Tensor | None, value: Tensor) -> str | None:
    """Return what a value must be and is not, None if it is; what the model lacks is refused later, by its name."""
    if is_composed(value):
        return (
            f"a plain tensor, found one of the class {type(value).__name__}; restore a file from before the model was "
            "quantized or sharded, and do that again"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
        return f"a plain tensor with values, found layout {value.layout} on {value.device}, dtype {value.dtype}"
    if own is None:
        return None
    if own.is_floating_point() and not value.is_floating_point():
        return f"floating point, found {value.dtype}"
    if value.is_complex() and not own.is_complex():
        return f"real, found {value.dtype}"
    return _not_whole(own.dtype, value) if own.dtype in _WHOLE else _out_of_range(own.dtype, value)


def _not_whole(dtype: torch.dtype, value: Tensor) -> str | None:
    """Return that numbers would be others in the model's dtype of whole numbers, None if they would not."""
    if value.dtype == dtype:
        return None
    given = _readable(value)
    made = given.to(dtype)
    # A negative number and the one that it becomes without a sign may be the same bits, and so come back.
    lost = (made.to(given.dtype) != given) | ((made.double() < 0) != (given.double() < 0))
    if not lost.any():
        return None
    return (
        f"of numbers that {dtype} has, which the model has there, found {given[lost][0].item():g}, which would be "
        f"{made[lost][0].item():g}; give the model the dtype of the file there, {value.dtype}"
    )


def _out_of_range(dtype: torch.dtype, value: Tensor) -> str | None:
    """Return that finite numbers would be infinite in the model's dtype, None if they are not."""
    if not dtype.is_floating_point or torch.finfo(value.dtype).max <= torch.finfo(dtype).max:
        return None
    finite = value.detach()[torch.isfinite(value)]
    lost = finite[~torch.isfinite(finite.to(dtype))]
    if not lost.numel():
        return None
    return (
        f"within the range of {dtype}, which the model has there, found {float(lost[0]):g}, which would be infinite; "
        f"give the model the dtype of the file, `model.to({value.dtype})`"
    )


def check_tied(groups: Iterable[Sequence[str]], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse several values for one tensor: all but the last would be lost.

    Args:
        groups: names of one tensor in the model.
        own: name -> what the model has there, or has in another structure.
        state: that is to be loaded, of the model's shapes.

    Raises:
        ValueError: If two values of a group are different in the model's dtype.
    """
    for first, *others in groups:
        for name in others:
            if not _is_alike(state[first], state[name], own[first].dtype):
                raise ValueError(
                    f"`source`: {first} and {name} must be equal, they are one tensor in the model, found two that "
                    "differ; one would be lost. Give the model two tensors, or take one out of the file. "
                    "Nothing was changed."
                )


def _is_alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    if one is other:
        return True
    left, right = (_readable(value.to(one.device, dtype)) for value in (one, other))
    return torch.equal(left, right) or bool(((left == right) | (left.isnan() & right.isnan())).all())


def warn_of_broken(weights: Collection[str], state: Mapping[str, Tensor]) -> None:
    """Warn of weights that are NaN or infinite; a buffer may be so on purpose, an attention mask for one."""
    floating = ((name, value) for name, value in state.items() if name in weights and value.is_floating_point())
    broken = [name for name, value in floating if not torch.isfinite(_readable(value)).all()]
    if broken:
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        warnings.warn(
            f"`source`: every weight should be finite, found NaN or infinity in {', '.join(broken[:4])}{more}. They "
            "are loaded as they are; the training that wrote them has diverged, or the file is damaged.",
            stacklevel=3,
        )


def _readable(value: Tensor) -> Tensor:
    """Return floating point of a dtype that torch has all operators for."""
    return value.detach().float() if value.dtype.itemsize == 1 else value.detach()
