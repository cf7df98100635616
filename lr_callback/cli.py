"""Command line: LightningCLI with the callback ready to configure, a look at a model, exports, tuning, studies."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from lr_callback import __version__
from lr_callback.analysis.analyze import analyze
from lr_callback.callback import LowRankCompression
from lr_callback.commands.export_command import export_command
from lr_callback.commands.report_command import report_command
from lr_callback.commands.stages import measure_stages
from lr_callback.commands.study.command import study_command
from lr_callback.commands.tune_command import tune_command
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.methods import Method
from lr_callback.observation.report import comparison, write

_DESCRIPTION = (
    "Train a model with low-rank compression on the way (fit), and evaluate checkpoints from before or after it. "
    "What compression would make of a model, without training it, shows: lr-callback analyze --help. "
    "A checkpoint's model for another program writes: lr-callback export --help. "
    "Which form of its layers is fastest on a device measures: lr-callback tune --help. "
    "A page of a checkpoint, with figures and tables, writes: lr-callback report --help. "
    "Methods are compared on one network by: lr-callback study --help"
)


class CompressionCLI(LightningCLI):
    """LightningCLI with the callback under ``compress``, and a comparison of a run's stages after ``fit``.

    A configuration may also name the callback in ``trainer.callbacks``, as in any LightningCLI; then that one is used.
    """

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Add ``--version`` to what stands before a command."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        version = f"lr_callback {__version__}"
        self.parser.add_argument("--version", action="version", version=version, help="Show the version and exit.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the callback."""
        parser.add_lightning_class_args(LowRankCompression, "compress")

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Leave out the callback of ``compress`` where ``trainer.callbacks`` names one.

        Raises:
            ValueError: If both are configured.
        """
        parser = self._parser(self.subcommand)
        listed = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        if any(isinstance(one, LowRankCompression) for one in (listed if isinstance(listed, list) else [listed])):
            if self._get(self.config, "compress") != parser.get_defaults()["compress"]:
                raise ValueError(
                    "lr-callback: LowRankCompression must be configured once, found arguments under `compress` and an "
                    "entry in `trainer.callbacks`; remove one of them."
                )
            parser.callback_keys = [key for key in parser.callback_keys if key != "compress"]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Let the callback keep the snapshots that are compared afterwards."""
        for callback in _compressions(self.trainer):
            callback.snapshots = True

    def after_fit(self) -> None:
        """Print the dense model, the cut one and the last one side by side, and how to have a page of it."""
        for callback in _compressions(self.trainer):
            if "final" in callback.snapshot_files and self.trainer.is_global_zero:
                stages = measure_stages(self.trainer, self.model, self.datamodule, callback.snapshot_files)
                write(f"\n{comparison(stages)}{_report_hint(self.trainer)}")


def _compressions(trainer: Trainer) -> list[LowRankCompression]:
    return [one for one in getattr(trainer, "callbacks", []) if isinstance(one, LowRankCompression)]


def _report_hint(trainer: Trainer) -> str:
    """Return how the run's page is written; nothing where it has no checkpoint with its record."""
    paths = [getattr(trainer.checkpoint_callback, name, "") for name in ("best_model_path", "last_model_path")]
    written = [Path(path) for path in paths if path and Path(path).is_file()]
    if not written:
        return ""
    here = Path.cwd()
    shown = written[0].relative_to(here) if written[0].is_relative_to(here) else written[0]
    return f"\n\na page of this: lr-callback report --checkpoint {shlex.quote(str(shown))}"


def analyze_command(arguments: Sequence[str]) -> None:
    """Print what a model would become, and the range that can be reached; nothing is changed.

    Args:
        arguments: of ``lr-callback analyze``; see its ``--help``.
    """
    parser = ArgumentParser(prog="lr-callback analyze", description="Show what compression would make of a model.")
    parser.add_argument("--config", action="config", help="a YAML file with these arguments")
    parser.add_subclass_arguments(nn.Module, "model", help="the model, by import path and its arguments")
    parser.add_argument("--keep_ratio", type=float, default=0.5, help="fraction of all parameters to keep, in (0, 1]")
    parser.add_subclass_arguments(Method, "method", required=False, help="how to choose; by default ALDS")
    parser.add_argument("--include", type=list[str] | None, help="patterns; only these layers are factorized")
    parser.add_argument("--exclude", type=list[str] | None, help="patterns of layers that stay dense")
    parser.add_argument("--embeddings", type=bool, default=False, help="factorize nn.Embedding layers, too")
    parser.add_argument(
        "--overrides", type=dict[str, Any] | None, help="pattern -> dense, {keep_ratio: ...}, {rank: ...}"
    )
    parser.add_argument("--json", type=str | None, help="a file to write the allocation to")
    chosen = parser.instantiate_classes(parser.parse_args(list(arguments)))
    if chosen.model is None:
        parser.error("--model must name a model, for example --model lr_callback.recipes.CifarResNet; got none.")
    try:
        choice = {name: chosen[name] for name in ("include", "exclude", "embeddings", "overrides")}
        found = analyze(chosen.model, chosen.method, **choice)
        allocation: Allocation = found.allocate(chosen.keep_ratio)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    write(str(allocation))
    low, high = found.reachable
    write(f"reachable: keep_ratio from {low:.4f} to {high:.0f}, of {found.dense_cost:,} {found.unit}")
    if chosen.json is not None:
        allocation.to_json(chosen.json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lr-callback``.

    Args:
        arguments: without the program's name; None: those of the process. Without any the help is shown.
    """
    # As with `python -m`: the models and data of a user stand in files beside the configuration.
    sys.path.insert(0, "")
    listed = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if listed[:1] == ["analyze"]:
        analyze_command(listed[1:])
        return
    if listed[:1] == ["study"]:
        study_command(listed[1:], write)
        return
    if listed[:1] == ["export"]:
        write(str(export_command(listed[1:])))
        return
    if listed[:1] == ["tune"]:
        write(tune_command(listed[1:]))
        return
    if listed[:1] == ["report"]:
        write(report_command(listed[1:]))
        return
    CompressionCLI(
        args=None if listed == sys.argv[1:] else listed,  # Lightning warns of arguments beside those of the process
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lr-callback", "description": _DESCRIPTION},
    )
