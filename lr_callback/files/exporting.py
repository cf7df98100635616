"""Exporting: a model as a file for another program, whole or not at all, and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from lr_callback.common.example import Example, classes_around, largest_difference
from lr_callback.common.table import align, on_one_line
from lr_callback.common.untouched import kept_buffers, untouched
from lr_callback.decisions.allocation import Allocation
from lr_callback.files.formats import FORMATS, Order, check_format
from lr_callback.files.values import check_has_values
from lr_callback.layers import FactorizedLayer
from lr_callback.model.held import dense_bytes, held_bytes

_TOLERANCES = {torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Dtype -> the largest difference of outputs that reordered sums explain, relative to the largest output."""
_TOLERANCE = 1e-3
"""Of all other dtypes."""


@dataclass(frozen=True)
class Exported:
    """What was written. Printed, it is a table.

    Args:
        format: a key of :data:`~lr_callback.files.formats.FORMATS`.
        path: of the file.
        file_bytes: its size: weights, graph and all else.
        weight_bytes: of the model's parameters and persistent buffers, as it was exported.
        dense_weight_bytes: what these would take if all layers were dense; what the file would is known once it is
            written.
        difference: the largest of the file's outputs to the model's, relative to the largest output.
        imports: modules with classes of the outputs, which must be imported before the file is read.
    """

    format: str
    path: Path
    file_bytes: int
    weight_bytes: int
    dense_weight_bytes: int
    difference: float
    imports: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int:
        """How much less the weights take than those of the model with all layers dense."""
        return self.dense_weight_bytes - self.weight_bytes

    @property
    def reload(self) -> str:
        """One line that makes a model of the file again."""
        first = f"import {', '.join(self.imports)}; " if self.imports else ""
        return first + FORMATS[self.format].reload.format(path=repr(str(self.path)))

    def __str__(self) -> str:
        """Return the table, and the line that reads the file."""
        sizes = self.dense_weight_bytes, self.weight_bytes, self.file_bytes
        row = [self.format, *(f"{size:,}" for size in sizes), f"{self.difference:.1e}"]
        header = ["format", "dense weight bytes", "weight bytes", "file bytes", "largest difference"]
        return f"{align(header, [row], right=frozenset({1, 2, 3, 4}))}\n{self.path}\nread it with: {self.reload}"


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    example_input: object = None,
    dynamic_batch: bool = True,
    allocation: Allocation | None = None,
) -> Exported:
    """Write a model, dense or factorized, to a file that holds its factors and gives its outputs.

    It is exported in eval mode, and given back as it was. The file is opened again and its outputs are compared with
    the model's before it takes its name, in place of a former file; whatever is raised, that one stays as it was.

    Args:
        model: any module.
        path: of the file; its folder must exist.
        format: ``torch-export``, ``onnx``, ``torchscript`` or ``safetensors``; None: by the path's suffix.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of named ones; safetensors needs
            none.
        dynamic_batch: let the file take any number of rows, the first axis of every tensor; otherwise it takes as
            many as the example has.
        allocation: of the model's factorized layers; safetensors writes its JSON into the file's header, under
            ``allocation``.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        ModuleNotFoundError: If the format needs a package that is not installed.
        ValueError: If the format is unknown or the path has the suffix of another, the model is on the meta device,
            there is no example, the model does not take it, its tensors have different numbers of rows, torch cannot
            follow the model, a file of the format cannot give what the model gives, the allocation is of another
            model, or the file gives other outputs.

    Example::

        >>> import lr_callback as lrc
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.5))
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.pt2"
        ...     done = export(model, file, example_input=torch.zeros(2, 64))
        ...     outputs = torch.export.load(file).module()(torch.ones(5, 64))
        >>> done.saved_bytes == 4 * (64 * 64 + 64 - sum(one.numel() for one in model.parameters()))
        True
    """
    path = Path(path)
    format = check_format(format, path)
    _check_path(path)
    check_has_values(model, "load its weights first. Nothing was written.")
    example = _example(format, example_input, dynamic_batch)
    notes = {} if allocation is None else {"allocation": _fitting(model, allocation).to_json()}
    model = getattr(model, "_orig_mod", model)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, untouched(model):
        part = Path(folder) / path.name
        with torch.compiler.set_stance("force_eager"):
            with kept_buffers(model):  # the file is to begin where the model did
                calls = _calls(model, example, dynamic_batch)
            _check_outputs(format, [outputs for _, outputs in calls])
            FORMATS[format].write(Order(model, example, dynamic_batch, notes), part)
            difference = _checked(format, part, calls, _tolerance(model, example))
        imports = _imports(calls) if FORMATS[format].keeps_classes else ()
        sizes = part.stat().st_size, held_bytes(model), dense_bytes(model)
        done = Exported(format, path, *sizes, difference, imports)
        part.replace(path)
    return done


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: `path` must name a file, found a folder. Nothing was written.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder must exist, found none; make it first. Nothing was written.")


def _example(format: str, example_input: object, dynamic_batch: bool) -> Example | None:
    """Read the example that a format needs."""
    if FORMATS[format].open is None:
        return None
    if example_input is None:
        raise ValueError(
            f"`example_input`: the format {format} is made by following one call of the model, got none; give a batch, "
            "as the model is called with. Nothing was written."
        )
    example = Example.of(example_input)
    if dynamic_batch and not example.rows:
        shapes = [tuple(tensor.shape) for tensor in example.tensors]
        raise ValueError(
            "`dynamic_batch`: all tensors of the example must have the same number of rows, at least one, on their "
            f"first axis, found the shapes {shapes}; pass `dynamic_batch=False`. Nothing was written."
        )
    return example


def _fitting(model: nn.Module, allocation: Allocation) -> Allocation:
    """Refuse an allocation of another model."""
    asked = {name: (one.num_slices, one.rank) for name, one in allocation.factorized.items()}
    found = {
        name: (layer.num_slices, layer.rank)
        for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLayer)
    }
    differing = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"`allocation` must be that of the model's factorized layers, they differ at {len(differing)}: {name} has "
            f"(slices, rank) {asked.get(name)} in the allocation and {found.get(name)} in the model. Nothing was "
            "written."
        )
    return allocation


def _calls(model: nn.Module, example: Example | None, dynamic_batch: bool) -> list[tuple[Example, object]]:
    """Return what a model gives for the example, and for other numbers of rows where the file is to take them.

    Raises:
        ValueError: If the model itself does not take the example, or another number of rows.
    """
    if example is None:
        return []
    try:
        calls = [(example, example.call(model))]
    except Exception as error:  # whatever the model raises
        raise ValueError(
            f"`example_input`: {type(model).__name__} must take it, found that {_rows(example)} make a "
            f"{type(error).__name__}: {on_one_line(error)}; give a batch as the model is called with. "
            "Nothing was written."
        ) from error
    for rows in {1, (example.rows or 1) + 1} - {example.rows} if dynamic_batch else ():
        other = example.with_rows(rows)
        try:
            calls.append((other, other.call(model)))
        except Exception as error:  # whatever the model raises
            raise ValueError(
                f"`dynamic_batch`: {type(model).__name__} must take any number of rows itself, found that "
                f"{_rows(other)} make a {type(error).__name__}: {on_one_line(error)}; pass `dynamic_batch=False`. "
                "Nothing was written."
            ) from error
    return calls


def _imports(calls: Sequence[tuple[Example, object]]) -> tuple[str, ...]:
    kinds = classes_around([(example.arguments, example.named, outputs) for example, outputs in calls])
    return tuple(sorted({kind.__module__ for kind in kinds}))


def _check_outputs(format: str, outputs: Sequence[object]) -> None:
    """Refuse what a model gives and files of a format cannot: of each call, one tensor at least and nothing foreign."""
    known = FORMATS[format].outputs
    for one in outputs:
        leaves = tree_leaves_with_path(one)
        foreign = [(path, leaf) for path, leaf in leaves if not isinstance(leaf, known)]
        if foreign or not any(isinstance(leaf, Tensor) for _, leaf in leaves):
            names = ", ".join(kind.__name__ for kind in known)
            places = [f"{type(leaf).__name__}{keystr(path) and f' at {keystr(path)}'}" for path, leaf in foreign]
            raise ValueError(
                f"{format}: the outputs of the model must be of the types {names}, in tuples, lists and dicts, with a "
                f"tensor among them, found {', '.join(places[:4]) or 'no tensor'}. Wrap the model in a module that "
                "gives what the file is to give, and export that one. Nothing was written."
            )


def _checked(format: str, part: Path, calls: Sequence[tuple[Example, object]], allowed: float) -> float:
    """Return the largest difference of a file's outputs to the model's.

    Raises:
        ValueError: If it is larger than what other sums of the same numbers make.
    """
    opener = FORMATS[format].open
    if opener is None:
        return 0.0
    try:
        run = opener(part)
    except Exception as error:  # each runtime has types of its own
        raise ValueError(_unreadable(format, "opened", error)) from error
    return max(_difference(run, format, example, expected, allowed) for example, expected in calls)


def _difference(
    run: Callable[[Example], object], format: str, example: Example, expected: object, allowed: float
) -> float:
    try:
        found = run(example)
    except Exception as error:
        raise ValueError(_unreadable(format, f"run on {_rows(example)}", error)) from error
    difference = largest_difference(expected, found)
    if difference is None or difference > allowed:
        told = "other shapes, types or whole numbers" if difference is None else f"{difference:.1e} relative to them"
        raise ValueError(
            f"{format}: the file must give the outputs of the model within {allowed:.0e}, found {told} for "
            f"{_rows(example)}. Its `forward` may draw random numbers, or take the number of rows or a value of the "
            "example for a constant: change it, or pass `dynamic_batch=False`. Nothing was written."
        )
    return difference


def _tolerance(model: nn.Module, example: Example | None) -> float:
    tensors = [*([] if example is None else example.tensors), *model.parameters()]
    return max((_TOLERANCES.get(one.dtype, _TOLERANCE) for one in tensors if one.is_floating_point()), default=0.0)


def _rows(example: Example) -> str:
    return f"inputs of shape {', '.join(str(tuple(tensor.shape)) for tensor in example.tensors)}"


def _unreadable(format: str, what: str, error: Exception) -> str:
    return (
        f"{format}: the file that was made must be one that can be {what}, found {type(error).__name__}: "
        f"{on_one_line(error)}. Not every runtime has every dtype: a copy of the model in float32 may do. "
        "Nothing was written."
    )
