"""Tune command: from a checkpoint on the disk to a table of times, and the weights in the forms that are fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import nn

from lr_callback.commands.answers import Parser
from lr_callback.commands.from_checkpoint import (
    add_checkpoint,
    add_model,
    call_of,
    check_model,
    check_writable,
    device_named,
    moved,
    parsed,
)
from lr_callback.commands.run_files import weights_in
from lr_callback.common.example import Example
from lr_callback.files.checkpoint import restore_
from lr_callback.files.exporting import export
from lr_callback.files.formats import FORMATS, check_format
from lr_callback.observation.report import write
from lr_callback.tuning.tune import tune, tune_
from lr_callback.tuning.tuned import Tuning
from lr_callback.units.latency import NoisyClockError

_KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hparams_name",
    "hparams_type",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)
"""Entries of a checkpoint that are of the module and not of its training: the new weights are not trained on."""
_SAFETENSORS = "safetensors"
_SUFFIXES = {"output": (".ckpt", ".pt", ".pth", FORMATS[_SAFETENSORS].suffix), "json": (".json",)}
"""Argument -> those of files that it may name."""


def tune_command(arguments: Sequence[str]) -> None:
    """Measure the forms of a checkpoint's layers, and write the weights in those that are fastest; tell both.

    Args:
        arguments: of ``lr-callback tune``; see its ``--help``.
    """
    parser = tune_parser()
    try:
        told = _tune(parsed(parser, arguments))
    except (ValueError, TypeError, OSError, ModuleNotFoundError, NoisyClockError) as error:
        parser.refuse(error)
    write(told)


def tune_parser() -> Parser:
    """Return the parser of ``lr-callback tune``."""
    description = "Measure which form of each factorized layer is fastest here, and write the weights so."
    parser: Parser = Parser(prog="lr-callback tune", description=description)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--output", type=str | None, help="a file for the weights, .ckpt, .pt or .safetensors; by default none")
    add("--json", type=str | None, help="a file for the times, .json")
    add("--batch_size", type=int | None, help="rows of the input; by default as many as it has")
    add("--device", type=str, default="cpu", help="where it is to be fast, as cpu or cuda:0")
    add_model(parser)
    return parser


def _tune(chosen: Namespace) -> str:
    checkpoint = Path(chosen.checkpoint)
    # All that can be refused is refused before anything is measured.
    check_model(chosen)
    files = {name: Path(chosen[name]) for name in ("output", "json") if chosen[name] is not None}
    for name, path in files.items():
        check_writable(f"--{name}", path, _SUFFIXES[name], checkpoint)
    if chosen.output is not None and files["output"].suffix == FORMATS[_SAFETENSORS].suffix:
        check_format(_SAFETENSORS, files["output"])  # the package that it needs
    device = device_named(chosen.device)
    restore_(chosen.model, checkpoint)
    called, example = call_of(chosen)
    example = moved(_of_rows(example, chosen.batch_size), device)
    tuning = tune(chosen.model.to(device), example.named or example.arguments, called=called)
    told = [str(tuning)]
    if "json" in files:
        tuning.to_json(files["json"])
        told.append(f"times: {files['json']}")
    if "output" in files:
        tune_(chosen.model, tuning)
        _write(files["output"], chosen.model.cpu(), checkpoint)
        told.append(_written(files["output"], tuning))
    return "\n".join(told)


def _of_rows(example: Example, rows: int | None) -> Example:
    """Return the example with so many rows; None: as it is.

    Raises:
        ValueError: If it is no number of rows, or the example has none.
    """
    if rows is None:
        return example
    if rows < 1:
        raise ValueError(f"--batch_size must be at least 1, got {rows}.")
    if not example.rows:
        shapes = [tuple(tensor.shape) for tensor in example.tensors]
        raise ValueError(
            "--batch_size: all tensors of the input must have the same number of rows, at least one, on their first "
            f"axis, found the shapes {shapes}; leave --batch_size out."
        )
    return example.with_rows(rows)


def _write(path: Path, model: nn.Module, checkpoint: Path) -> None:
    """Write the weights, whole or not at all; what else says how the module is made goes along."""
    if path.suffix == FORMATS[_SAFETENSORS].suffix:
        export(model, path, format=_SAFETENSORS)
        return
    state: Mapping[str, Any] = model.state_dict()
    if isinstance(model, LightningModule):
        loaded = weights_in(checkpoint)
        state = {**{name: loaded[name] for name in _KEPT if name in loaded}, "state_dict": state}
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        torch.save(state, part)
        part.replace(path)


def _written(path: Path, tuning: Tuning) -> str:
    how = "in the chosen forms" if tuning.changed else "as they were built"
    lines = [f"weights {how}: {path}", f"read it with: lr_callback.restore_(model, {str(path)!r})"]
    if tuning.channels_last_is_faster:
        lines.append("a file keeps no memory format; after reading it: model.to(memory_format=torch.channels_last)")
    if tuning.pointwise_is_faster:
        lines.append("a file keeps no way to multiply; after reading it: lr_callback.pointwise_(model)")
    return "\n".join(lines)
