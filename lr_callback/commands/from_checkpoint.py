"""From a checkpoint: the model of a run, its weights, and a call of it, as far as files and a command line say them."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lr_callback.commands.run_files import RunFiles
from lr_callback.commands.stages import call_of_step, calls_of_step
from lr_callback.common.example import Example

_MADE = ("model", "data")
"""Arguments that are made into objects."""


def add_checkpoint(parser: ArgumentParser, help_text: str = "a checkpoint of Lightning, or a state dict") -> None:
    """Add the argument for the checkpoint.

    Args:
        parser: of a command that begins with one.
        help_text: what it may be.
    """
    parser.add_argument("--checkpoint", type=str, required=True, help=help_text)


def add_model(parser: ArgumentParser) -> None:
    """Add the arguments by which the model, its data and its input are found.

    Args:
        parser: of a command that begins with a checkpoint.
    """
    add = parser.add_argument
    add("--config", type=str | None, help="the run's configuration; by default the config.yaml above the checkpoint")
    parser.add_subclass_arguments(nn.Module, "model", required=False, help="by default that of the run")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False, help="by default that of the run")
    add("--input_shape", type=str | None, help="of an input of random numbers, as 1,3,32,32, instead of the data's")


def parsed(
    parser: ArgumentParser, arguments: Sequence[str], files: RunFiles | None = None, without: Collection[str] = ()
) -> Namespace:
    """Read a command line, what it leaves out from the files of the run; make model and data.

    Args:
        parser: with the arguments of :func:`add_checkpoint` and :func:`add_model`.
        arguments: the command line.
        files: of the run; None: those that the command line names.
        without: of ``model`` and ``data`` what is not taken from the files.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the checkpoint cannot be read, or the shape of the input is none.
    """
    files = files or files_named(arguments)
    if files is not None and len(without) < len(_MADE):
        seen = _peek(arguments)
        described = files.described(seen.model, _class_path(seen.data))
        parser.set_defaults({name: part for name, part in described.items() if name not in without})
    read = parser.parse_args(list(arguments))
    if read.input_shape is not None:
        _sizes(read.input_shape)
    chosen: Namespace = parser.instantiate_classes(read)
    return chosen


def files_named(arguments: Sequence[str]) -> RunFiles | None:
    """Return the files of the run that a command line names; None if it names no checkpoint."""
    seen = _peek(arguments)
    return None if seen.checkpoint is None else RunFiles(Path(seen.checkpoint), seen.config)


def _peek(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments that say where the others have their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--checkpoint", "--config", "--model", "--data"):
        parser.add_argument(name, nargs="?")  # that a value is missing, the command's own parser says
    return parser.parse_known_args(list(arguments))[0]


def named_model(words: Sequence[str]) -> str | None:
    """Return the class of the model that a command line names without arguments of its own; else None."""
    alone = not any(word.startswith("--model.") for word in words)
    return _class_path(_peek(words).model) if alone else None


def _class_path(named: str | None) -> str | None:
    """Return what a command line names, if it is a class: it may be a file, too."""
    return named if named is not None and "." in named and named.replace(".", "_").isidentifier() else None


def check_model(chosen: Namespace) -> None:
    """Refuse a command line that names no model, where no file does either.

    Raises:
        ValueError: If so.
    """
    if chosen.model is None:
        why = RunFiles(Path(chosen.checkpoint), chosen.config).why_unknown()
        raise ValueError(
            f"--model must name a model, for example --model lr_callback.recipes.CifarResNet: {why}; got none. Or give "
            "a configuration that names it: --config config.yaml."
        )


def check_other_file(output: Path, checkpoint: Path, option: str) -> None:
    """Refuse to write over what is read: of a training checkpoint more than the weights would be lost.

    Raises:
        ValueError: If both are one file.
    """
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise ValueError(
            f"{option} must be another file than the checkpoint, found that {output} is --checkpoint {checkpoint}; "
            "give another name. Nothing was written."
        )


def check_writable(option: str, path: Path, suffixes: Collection[str], checkpoint: Path | None = None) -> None:
    """Refuse a file that cannot be written, or is of another kind, before anything that takes time.

    Args:
        option: of the command line, that names it.
        path: of the file.
        suffixes: of files of its kind, so that none of another is ever written over.
        checkpoint: that is read; None: there is none.

    Raises:
        ValueError: If it is a folder, or the checkpoint, or has another suffix.
        OSError: If its folder is missing, or does not take a file.
    """
    if path.is_dir():
        raise ValueError(f"{option} must name a file, found the folder {path}. Nothing was written.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: its folder must exist, found none; make it first.")
    if checkpoint is not None:
        check_other_file(path, checkpoint, option)
    if path.suffix not in suffixes:
        raise ValueError(
            f"{option} {path}: must end in {' or '.join(suffixes)}, so that no file of another kind is written over, "
            f"found {path.suffix or 'no suffix'!r}; name it {path.stem}{next(iter(suffixes))}. Nothing was written."
        )
    try:
        with TemporaryDirectory(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(
            f"{option} {path}: its folder must take a file, found that it does not ({error.strerror}); name a file in "
            f"another folder with {option}. Nothing was written."
        ) from error


def device_named(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        ValueError: If it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises several for one that is missing
        raise ValueError(
            f"--device must be one that is here, as cpu or cuda, got {name}: {str(error).splitlines()[0]}"
        ) from error
    return device


def moved(example: Example, device: torch.device) -> Example:
    """Return the same call with its tensors on a device."""

    def on_device(leaf: object) -> object:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return Example(*tree_map(on_device, (example.arguments, example.named)))


def call_of(chosen: Namespace) -> tuple[nn.Module, Example]:
    """Return the module that is called, and how, by the command line, the model's example or the run's data.

    Raises:
        ValueError: If none of these says so, or several modules are called one after the other.
    """
    return _example(chosen) or call_of_step(_lightning(chosen), chosen.data)


def calls_of(chosen: Namespace) -> list[tuple[nn.Module, Example]]:
    """Return all modules that are called, in order, and how; see :func:`call_of`."""
    example = _example(chosen)
    return calls_of_step(_lightning(chosen), chosen.data) if example is None else [example]


def _example(chosen: Namespace) -> tuple[nn.Module, Example] | None:
    if chosen.input_shape is not None:
        return chosen.model, Example((random_input(chosen.input_shape),))
    example = getattr(chosen.model, "example_input_array", None)
    return None if example is None else (chosen.model, Example.of(example))


def _lightning(chosen: Namespace) -> LightningModule:
    if not isinstance(chosen.model, LightningModule):
        raise ValueError(
            f"--input_shape must say what {type(chosen.model).__name__} is called with, for example "
            "--input_shape 1,3,32,32; got none."
        )
    return chosen.model


def random_input(shape: str) -> Tensor:
    """Return random numbers of a shape as a command line says it, the same ones each time.

    Raises:
        ValueError: If it is none.
    """
    return torch.randn(_sizes(shape), generator=torch.Generator().manual_seed(0))


def _sizes(shape: str) -> list[int]:
    sizes = [size.strip() for size in shape.strip("[]()").split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input_shape must be whole numbers from 1, for example 1,3,32,32, got {shape}.")
    return [int(size) for size in sizes]
