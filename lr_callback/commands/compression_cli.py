"""LightningCLI with the callback ready to configure, and a comparison of a run's stages after ``fit``."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lr_callback import __version__
from lr_callback.callback import LowRankCompression
from lr_callback.commands.answers import Parser
from lr_callback.commands.places import is_in_training, is_of_log_folder, refusal_in
from lr_callback.commands.run_files import check_there
from lr_callback.commands.stages import measure_stages
from lr_callback.files.source import check_kind
from lr_callback.observation.report import comparison, write
from lr_callback.units.latency import NoisyClockError

_REFUSALS = (ValueError, TypeError, OSError, ModuleNotFoundError, MisconfigurationException, NoisyClockError)
_IS_NO_FILE = re.compile(r"best|last|hpc|registry.*|\w+://.*")
"""What Lightning looks up itself, or elsewhere."""
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


class _LightningParser(LightningArgumentParser, Parser):
    """Lightning's parser, with the answers of this package's."""


class _Program(CompressionCLI):
    """The command line as a program: a refusal before the training is one line; any other error has its traceback."""

    def __init__(self, arguments: Sequence[str]) -> None:
        try:
            super().__init__(
                args=None if list(arguments) == sys.argv[1:] else list(arguments),  # Lightning warns of others
                save_config_kwargs={"overwrite": True},
                parser_class=_LightningParser,
                parser_kwargs={"prog": "lr-callback", "description": _DESCRIPTION},
            )
        except _REFUSALS as error:
            refused = _without_folder(error) if is_of_log_folder(error) else refusal_in(error)
            if refused is None or is_in_training(error):
                raise
            self._refuse(refused)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse a checkpoint that there is not before anything is made."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and not _IS_NO_FILE.fullmatch(str(path)) and not Path(path).is_dir():
            check_kind(check_there(Path(path), "--ckpt_path"), "--ckpt_path")

    def _refuse(self, error: BaseException) -> NoReturn:
        config = self.config[self.config.subcommand]
        parser = self._subcommand_parsers[self.config.subcommand]
        assert isinstance(parser, _LightningParser)
        # What is wrong in a callback that `trainer.callbacks` lists has no name on the command line.
        is_listed = config.trainer.callbacks and config.compress == parser.get_defaults()["compress"]
        parser.refuse(error, {} if is_listed else None)


def _without_folder(error: BaseException) -> BaseException:
    assert isinstance(error, OSError)
    return OSError(
        "--trainer.default_root_dir: the files of a run must have a folder that takes them, found that "
        f"{error.filename} does not ({error.strerror}). Name another there, or in `trainer.logger`."
    )


def lightning_command(arguments: Sequence[str]) -> None:
    """Run ``lr-callback fit``, and what else LightningCLI does.

    Args:
        arguments: of ``lr-callback``; see its ``--help``.
    """
    _Program(arguments)
