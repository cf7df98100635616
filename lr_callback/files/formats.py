"""Formats: the files that a model leaves torch in, one row a format: how it is written, and how it is run again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from lr_callback.common.example import Example
from lr_callback.common.untouched import kept_buffers
from lr_callback.files.safetensors_file import read_safetensors, same_tensors, write_safetensors

if TYPE_CHECKING:
    from onnx_ir import Graph

ONNX_LIMIT = 2**31 - 1
"""Bytes of the largest ONNX file: it is one message of protobuf."""


@dataclass(frozen=True)
class Order:
    """What is to be written.

    Args:
        model: in eval mode.
        example: a call of it; None: of a format that needs none.
        dynamic_batch: whether the file is to take any number of rows.
        notes: name -> text, where a format has a place for it.
    """

    model: nn.Module
    example: Example | None
    dynamic_batch: bool
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Args:
        suffix: of its files.
        packages: that it needs besides torch.
        reload: one line that makes a model of a file again.
        write: writes a file.
        open: opens a file, and returns what gives the outputs of a call; None: the file has no outputs of its own,
            and is compared with the state dict of the model when it is written.
        outputs: types of what its files can give, in tuples, lists and dicts.
        needs_suffix: whether what reads its files asks for the suffix.
        keeps_classes: whether its files name the classes of outputs, which must be there when they are read.
    """

    suffix: str
    packages: tuple[str, ...]
    reload: str
    write: Callable[[Order, Path], None]
    open: Callable[[Path], Callable[[Example], object]] | None
    outputs: tuple[type, ...] = (torch.Tensor,)
    needs_suffix: bool = False
    keeps_classes: bool = False


def exported_program(order: Order) -> ExportedProgram:
    """Return the graph of a model, without the example and without the paths of the code that it was made from.

    Raises:
        ValueError: If torch cannot follow the model's ``forward``.
    """
    assert order.example is not None
    example, axes = order.example, None
    if order.dynamic_batch:
        # torch takes an axis of size 1 for one that never changes.
        example = example.with_rows(max(2, example.rows or 2))
        axes = example.axes(order.model, Dim("batch"))
    try:
        program = torch.export.export(order.model, example.arguments, example.named, dynamic_shapes=axes)
    except Exception as error:  # torch raises a dozen types for what it cannot follow
        raise ValueError(_refusal("torch.export", order, error)) from error
    program.example_inputs = None
    for graph in (one.graph for one in program.graph_module.modules() if isinstance(one, torch.fx.GraphModule)):
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)
    return program


def _refusal(tool: str, order: Order, error: Exception) -> str:
    batch = (
        "; if the number of rows is what it stumbles over, pass `dynamic_batch=False`" if order.dynamic_batch else ""
    )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"{tool} must be able to follow {type(order.model).__name__}.forward on the example input, found "
        f"{type(error).__name__}: {' '.join(lines)[:400]}{batch}. Nothing was written."
    )


def _write_program(order: Order, path: Path) -> None:
    with warnings.catch_warnings():
        # Of weights in channels_last; what the file gives is compared with the model all the same.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        program = exported_program(order)
        try:
            torch.export.save(program, path)
        except NotImplementedError as error:  # of an output's class that torch knows, and not how to write
            raise ValueError(_refusal("torch.export.save", order, error)) from error


def _open_program(path: Path) -> Callable[[Example], object]:
    module = torch.export.load(path).module()
    return lambda example: example.call(module)


def _write_onnx(order: Order, path: Path) -> None:
    program = exported_program(order)
    held = sum(tensor.nbytes for tensor in program.state_dict.values())
    if held > ONNX_LIMIT:
        raise ValueError(
            f"{path.name}: an ONNX file must stay below {ONNX_LIMIT:,} bytes, found weights of {held:,}. Export to "
            "torch-export, or call torch.onnx.export(..., external_data=True) yourself. Nothing was written."
        )
    try:
        made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False)
    except Exception as error:  # whatever an operator that ONNX does not know raises
        raise ValueError(_refusal("torch.onnx.export", order, error)) from error
    assert made is not None
    _tidy(made.model.graph)
    made.save(path, external_data=False)


def _tidy(graph: Graph) -> None:
    """Call the number of rows ``batch``, and take out the code that nodes were made from, with this machine's paths."""
    changing = (str(size) for value in graph.inputs for size in value.shape or () if not isinstance(size, int))
    symbol = re.compile(rf"\b{next(changing, 'batch')}\b")
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]:
        for axis, size in enumerate(value.shape or ()):
            if value.shape is not None and not isinstance(size, int):
                value.shape[axis] = symbol.sub("batch", str(size))


def _open_onnx(path: Path) -> Callable[[Example], object]:
    runtime = import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(example: Example) -> object:
        arrays = [tensor.detach().cpu().numpy() for tensor in example.tensors]
        return [torch.from_numpy(one) for one in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _write_torchscript(order: Order, path: Path) -> None:
    assert order.example is not None
    example = order.example
    trace: Callable[..., torch.jit.ScriptModule] = torch.jit.trace
    try:
        with _quiet_jit(order.model):
            given = {"example_inputs": example.arguments} if example.arguments else {}
            named = {"example_kwarg_inputs": example.named} if example.named else {}
            with kept_buffers(order.model):  # which the file is to hold, and tracing runs the model
                made = trace(order.model, check_trace=False, strict=False, **given, **named)
            torch.jit.save(made, path)
    except Exception as error:  # torch raises several types for what it cannot trace
        raise ValueError(_refusal("torch.jit.trace", order, error)) from error


def _open_torchscript(path: Path) -> Callable[[Example], object]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")
        load: Callable[[Path], Callable[..., object]] = torch.jit.load
        module = load(path)
    return lambda example: example.call(module)


@contextmanager
def _quiet_jit(model: nn.Module) -> Iterator[None]:
    """Let a model be traced without being told at each step that torch wants TorchScript to be left."""
    flag = "_jit_is_scripting"
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="`torch.jit.* is deprecated")
        warnings.simplefilter("ignore", DeprecationWarning)  # of the properties of modules: all are looked at
        # LightningModule has it: while it is set, `trainer` may be looked at where there is none.
        for base in {base for module in model.modules() for base in type(module).__mro__ if flag in vars(base)}:
            stack.callback(setattr, base, flag, vars(base)[flag])
            setattr(base, flag, True)
        yield


def _write_safetensors(order: Order, path: Path) -> None:
    state: dict[str, Any] = order.model.state_dict()
    write_safetensors(path, state, order.notes)
    if not same_tensors(state, read_safetensors(path)):
        raise ValueError(f"{path.name}: the file must hold the model's tensors, found others. Nothing was written.")


FORMATS: Mapping[str, Format] = {
    "torch-export": Format(
        ".pt2",
        (),
        "model = torch.export.load({path}).module()",
        _write_program,
        _open_program,
        (torch.Tensor, bool, int, float, NoneType),
        needs_suffix=True,
        keeps_classes=True,
    ),
    "onnx": Format(
        ".onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        "session = onnxruntime.InferenceSession({path})",
        _write_onnx,
        _open_onnx,
        (torch.Tensor, NoneType),
    ),
    "torchscript": Format(".ts", (), "model = torch.jit.load({path})", _write_torchscript, _open_torchscript),
    "safetensors": Format(
        ".safetensors", ("safetensors",), "lr_callback.restore_(model, {path})", _write_safetensors, None
    ),
}
"""Name -> row."""


def check_format(name: str | None, path: Path) -> str:
    """Return the name of a format, by a file's suffix where none is given.

    Raises:
        ValueError: If there is no such format, none of this suffix, or the suffix is that of another.
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    asked = {row.suffix: known for known, row in FORMATS.items()}.get(path.suffix, "") if name is None else name
    if asked not in FORMATS:
        given = f"the suffix {path.suffix!r} of {path.name!r}" if name is None else repr(name)
        known = ", ".join(f"{one} ({row.suffix})" for one, row in FORMATS.items())
        raise ValueError(f"`format` must be one of {known}, got {given}. Nothing was written.")
    others = {row.suffix for known, row in FORMATS.items() if known != asked}
    if path.suffix in others or (FORMATS[asked].needs_suffix and path.suffix != FORMATS[asked].suffix):
        raise ValueError(
            f"{path.name}: a file of the format {asked} must end in {FORMATS[asked].suffix}, found {path.suffix!r}; "
            "what reads it would take it for another. Nothing was written."
        )
    missing = [package for package in FORMATS[asked].packages if not find_spec(package)]
    if missing:
        raise ModuleNotFoundError(
            f"The format {asked} needs {', '.join(FORMATS[asked].packages)}, found no {', '.join(missing)}; install "
            "with: pip install 'lr_callback[export]'. Nothing was written."
        )
    return asked
