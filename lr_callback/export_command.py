"""Export command: from a checkpoint on the disk to the model, a call of it, and a file for another program."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lr_callback.allocation import Allocation
from lr_callback.checkpoint import restore_
from lr_callback.example import Example
from lr_callback.exporting import Exported, export
from lr_callback.find import factorized_in
from lr_callback.formats import FORMATS
from lr_callback.layers import FactorizedLayer
from lr_callback.noted import in_the_names_of, noted_allocation
from lr_callback.source import load
from lr_callback.stages import call_of_step
from lr_callback.table import listed

_HYPERPARAMETERS = "hyper_parameters"
_CLASS = "_class_path"
"""What LightningCLI adds to the hyperparameters of a module that saves them."""


def export_command(arguments: Sequence[str]) -> Exported:
    """Write a checkpoint's model to a file.

    Args:
        arguments: of ``lr-callback export``; see its ``--help``.

    Returns:
        What was written.
    """
    parser = export_parser()
    seen = _peek(arguments)
    try:
        if seen.checkpoint is not None:
            parser.set_defaults(_of_the_run(Path(seen.checkpoint), seen.config, seen.model))
        chosen = parser.instantiate_classes(parser.parse_args(list(arguments)))
        return _export(chosen)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))


def export_parser() -> ArgumentParser:
    """Return the parser of ``lr-callback export``."""
    parser = ArgumentParser(prog="lr-callback export", description="Write a checkpoint's model for another program.")
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="a checkpoint of Lightning, or a state dict")
    add("--format", type=str | None, help=f"one of {', '.join(FORMATS)}; by default by the suffix of --output")
    add("--output", type=str | None, help="the file; by default beside the checkpoint, with the suffix of the format")
    add("--config", type=str | None, help="the run's configuration; by default the config.yaml above the checkpoint")
    parser.add_subclass_arguments(nn.Module, "model", required=False, help="by default that of the run")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False, help="by default that of the run")
    add("--input_shape", type=str | None, help="of an input of random numbers, as 1,3,32,32, instead of the data's")
    add("--dynamic_batch", type=bool, default=True, help="whether the file takes any number of rows")
    return parser


def _peek(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments that say where the others have their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--checkpoint", "--config", "--model"):
        parser.add_argument(name)
    return parser.parse_known_args(list(arguments))[0]


def _of_the_run(checkpoint: Path, config: str | None, model: str | None) -> dict[str, Any]:
    """Return how the run made its model and its data, as far as its files say so."""
    written = _config(checkpoint, config)
    found = _described(written.get("model"), model) if config is not None else None
    found = found or _hyperparameters(checkpoint, model) or _described(written.get("model"), model)
    parts = {"model": found, "data": _described(written.get("data"), None)}
    return {name: part for name, part in parts.items() if part is not None}


def _config(checkpoint: Path, config: str | None) -> Mapping[str, Any]:
    """Read the run's configuration, which LightningCLI writes into the folder that holds that of the checkpoints."""
    if config is not None and not Path(config).is_file():
        raise FileNotFoundError(f"--config {config}: no such file.")
    nearby = (folder / "config.yaml" for folder in checkpoint.resolve().parents[:3])
    for path in [Path(config)] if config is not None else [path for path in nearby if path.is_file()]:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(written, Mapping):
            return written
    return {}


def _described(part: object, model: str | None) -> dict[str, Any] | None:
    """Return a part of a configuration as class and arguments; None if it is none, or of another class than asked."""
    if not isinstance(part, Mapping):
        return None
    if "class_path" in part:
        return dict(part) if model is None or part["class_path"].endswith(model) else None
    return None if model is None else {"class_path": model, "init_args": dict(part)}


def _hyperparameters(checkpoint: Path, model: str | None) -> dict[str, Any] | None:
    """Return class and arguments from what a LightningModule saved; None if it saved nothing, or not which it was."""
    loaded = _loaded(checkpoint)
    if model is not None and not _is_lightning(model):
        return None  # a network inside of what has saved them
    saved = loaded.get(_HYPERPARAMETERS) or {}
    arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
    class_path = model or saved.get(_CLASS)
    return None if class_path is None or not saved else {"class_path": class_path, "init_args": arguments}


def _is_lightning(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    return isinstance(found, type) and issubclass(found, LightningModule)


def _loaded(checkpoint: Path) -> Mapping[str, Any]:
    loaded = load(checkpoint)
    if isinstance(loaded, Allocation):
        raise ValueError(f"--checkpoint {checkpoint}: must be a file with weights, found an allocation.")
    return loaded


def _export(chosen: Namespace) -> Exported:
    checkpoint = Path(chosen.checkpoint)
    if chosen.format is None and chosen.output is None:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got none.")
    if chosen.format not in (None, *FORMATS):
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {chosen.format}.")
    if chosen.model is None:
        raise ValueError(
            f"--model must name a model, for example --model lr_callback.recipes.CifarResNet: {checkpoint.name} does "
            "not say how its model is made, and there is no configuration of its run in the folders above; got none. "
            "Or give the configuration: --config config.yaml."
        )
    output = Path(chosen.output or checkpoint.with_suffix(FORMATS[chosen.format].suffix))
    _check_output(output, checkpoint)
    restore_(chosen.model, checkpoint)
    named = chosen.format or next((name for name, row in FORMATS.items() if row.suffix == output.suffix), None)
    model, example = _call(chosen, needs_example=named is not None and FORMATS[named].open is not None)
    return export(
        model,
        output,
        format=chosen.format,
        example_input=None if example is None else (example.named or example.arguments),
        dynamic_batch=chosen.dynamic_batch,
        allocation=_allocation(checkpoint, model) if named == "safetensors" else None,
    )


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuse to write over what is read: of a training checkpoint more than the weights would be lost."""
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise ValueError(
            f"--output must be another file than the checkpoint, found that {output} is --checkpoint {checkpoint}; "
            "give another name. Nothing was written."
        )


def _call(chosen: Namespace, needs_example: bool) -> tuple[nn.Module, Example | None]:
    """Return what is to be exported, and how it is called."""
    if not needs_example:
        return chosen.model, None
    if chosen.input_shape is not None:
        return chosen.model, Example((_random(chosen.input_shape),))
    example = getattr(chosen.model, "example_input_array", None)
    if example is not None:
        return chosen.model, Example.of(example)
    if not isinstance(chosen.model, LightningModule):
        raise ValueError(
            f"--input_shape must say what {type(chosen.model).__name__} is called with, for example "
            "--input_shape 1,3,32,32; got none."
        )
    return call_of_step(chosen.model, chosen.data)


def _random(shape: str) -> Tensor:
    """Return random numbers, the same ones each time."""
    sizes = [size.strip() for size in shape.strip("[]()").split(",")]
    if not all(size.isdigit() for size in sizes):
        raise ValueError(f"--input_shape must be whole numbers, for example 1,3,32,32, got {shape}.")
    return torch.randn([int(size) for size in sizes], generator=torch.Generator().manual_seed(0))


def _written(checkpoint: Path) -> Allocation | None:
    """Return the allocation that the callback wrote into a checkpoint, or `export` into a header."""
    loaded = _loaded(checkpoint)
    noted = noted_allocation(loaded)
    states = loaded.get("callbacks", {}).values() if noted is None else ()
    written = [one["allocation"] for one in states if isinstance(one, Mapping) and one.get("allocation")]
    return Allocation.from_dict(written[-1]) if written else noted


def _allocation(checkpoint: Path, model: nn.Module) -> Allocation | None:
    """Return the allocation in a checkpoint, in the names of what is exported; None, told, if it is not that of it.

    It is not an error: a run may have gone on to another structure after its latest compression.
    """
    allocation = _written(checkpoint)
    if allocation is None:
        return None
    layers = ((name, one) for name, one in model.named_modules() if isinstance(one, FactorizedLayer))
    found = in_the_names_of(allocation, [([name], (one.num_slices, one.rank)) for name, one in layers])
    if found is None:
        warnings.warn(
            f"{checkpoint.name}: its allocation should be that of the exported layers, found one of "
            f"{listed(list(allocation.factorized)) or 'no layers'}, and factorized are "
            f"{listed(factorized_in(model)) or 'none'}; the file is written without it.",
            stacklevel=2,
        )
    return found
