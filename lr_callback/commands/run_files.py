"""Files of a run: what they say of how its model and its data are made, each file read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule

from lr_callback.common.table import listed, on_one_line
from lr_callback.decisions.allocation import Allocation
from lr_callback.files.source import load

_HYPERPARAMETERS = "hyper_parameters"
_CLASS = "_class_path"
"""What LightningCLI adds to the hyperparameters of a module that saves them."""


@dataclass(frozen=True)
class RunFiles:
    """The checkpoint of a run, and its configuration.

    Args:
        checkpoint: of the run.
        config: a file of the configuration; None: one is looked for above the checkpoint.
    """

    checkpoint: Path
    config: str | None = None

    @cached_property
    def loaded(self) -> Mapping[str, Any]:
        """What is in the checkpoint.

        Raises:
            ValueError: If it is an allocation.
        """
        return weights_in(self.checkpoint)

    @cached_property
    def configuration(self) -> Mapping[str, Any]:
        """The run's configuration, which LightningCLI writes into the folder that holds that of the checkpoints.

        Nothing where there is no file.

        Raises:
            FileNotFoundError: If ``config`` does not exist.
            ValueError: If a file is no YAML, or ``config`` holds something else than arguments.
        """
        if self.config is not None:
            return _arguments_in(self.config)
        above = (folder / "config.yaml" for folder in self.checkpoint.resolve().parents[:3])
        found = (_yaml_in(path) for path in above if path.is_file())
        return next((written for written in found if isinstance(written, Mapping)), {})

    def described(self, model: str | None = None, data: str | None = None) -> dict[str, Any]:
        """Return how the run made its model and its data, as far as its files say so.

        Args:
            model: class of the model, where that is known; None: that of the files.
            data: likewise of the data.

        Returns:
            ``model`` and ``data``, those that are known, each by ``class_path`` and ``init_args``.
        """
        written = self.configuration
        found = _described(written.get("model"), model) if self.config is not None else None
        found = found or self._hyperparameters(model) or _described(written.get("model"), model)
        parts = {"model": found, "data": _described(written.get("data"), data)}
        return {name: part for name, part in parts.items() if part is not None}

    def why_unknown(self) -> str:
        """Return why the files do not say how the model is made."""
        if "model" in self.configuration:
            return "the configuration of the run has the arguments of its model, and not the class"
        name = self.checkpoint.name
        return f"{name} does not say how its model is made, and there is no config.yaml of its run above it"

    def _hyperparameters(self, model: str | None) -> dict[str, Any] | None:
        """Return class and arguments that a LightningModule saved; None if it saved nothing, or not which it was."""
        loaded = self.loaded
        if model is not None and not _is_lightning(model):
            return None  # a network inside of what has saved them
        saved = loaded.get(_HYPERPARAMETERS)
        if not isinstance(saved, Mapping) or not saved:
            return None
        arguments = {name: value for name, value in saved.items() if isinstance(name, str) and not name.startswith("_")}
        class_path = model or saved.get(_CLASS)
        return {"class_path": class_path, "init_args": arguments} if isinstance(class_path, str) else None


def _arguments_in(config: str) -> Mapping[str, Any]:
    """Return what a configuration that a command line names says."""
    if not Path(config).is_file():
        raise FileNotFoundError(f"--config {config}: no such file.")
    written = _yaml_in(Path(config))
    if not isinstance(written, Mapping):
        raise ValueError(
            f"--config {config}: must hold names and values, such as `model:` with a class_path, found "
            f"{type(written).__name__}; give the config.yaml of the run."
        )
    return written


def _yaml_in(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = on_one_line(str(error).replace(' in "<unicode string>"', ""), most=300)
        raise ValueError(
            f"{path}: must be YAML, plain text in UTF-8, found {found}; mend it, or name another file by --config."
        ) from error


def _described(part: object, model: str | None) -> dict[str, Any] | None:
    """Return a part of a configuration as class and arguments; None if it is none, or of another class than asked."""
    if not isinstance(part, Mapping):
        return None
    if "class_path" in part:
        class_path = part["class_path"]
        return dict(part) if isinstance(class_path, str) and class_path.endswith(model or "") else None
    return None if model is None else {"class_path": model, "init_args": dict(part)}


def _is_lightning(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise ModuleNotFoundError(
                f"--model {class_path}: no module {error.name!r} is found from here; name the class by the path that "
                "your program imports it by, in the folder in which it does."
            ) from error
        raise
    return isinstance(found, type) and issubclass(found, LightningModule)


def weights_in(checkpoint: Path) -> Mapping[str, Any]:
    """Return the dict of a file with weights.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is an allocation, a folder, or cannot be read.
    """
    check_there(checkpoint, "--checkpoint")
    try:
        loaded = load(checkpoint, "Name another checkpoint of the run.")
    except ValueError as error:
        text = str(error).removeprefix(f"{checkpoint.name}: ")
        raise ValueError(f"--checkpoint {checkpoint}: {text}") from error
    if isinstance(loaded, Allocation):
        raise ValueError(f"--checkpoint {checkpoint}: must be a file with weights, found an allocation.")
    return loaded


def check_there(checkpoint: Path, option: str) -> Path:
    """Return the path of a checkpoint that is there.

    Args:
        checkpoint: that is named.
        option: of the command line, that names it.

    Raises:
        FileNotFoundError: If there is none; those beside it are named.
    """
    if checkpoint.is_file():
        return checkpoint
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    there = [str(path) for path in sorted(folder.glob("*.ckpt"))]
    found = "must be a file, found a folder" if checkpoint.is_dir() else "no such file"
    near = f" There are {listed(there)}." if there else ""
    raise FileNotFoundError(f"{option} {checkpoint}: {found}; name one that ModelCheckpoint wrote.{near}")
