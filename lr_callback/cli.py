"""Command line: which command a line names. Each one is imported when it is run: the version is said at once."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper

from lr_callback import __version__

OWN: Mapping[str, str] = {
    "analyze": "lr_callback.commands.analyze_command",
    "export": "lr_callback.commands.export_command",
    "report": "lr_callback.commands.report_command",
    "study": "lr_callback.commands.study.command",
    "tune": "lr_callback.commands.tune_command",
}
"""Commands of this package -> where a function of their name, ``analyze_command`` for one, carries them out."""
LIGHTNING = ("fit", "validate", "test", "predict")
"""Those of LightningCLI."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``lr-callback``.

    Args:
        arguments: without the program's name; None: those of the process. Without any the help is shown.
    """
    # As with `python -m`: the models and data of a user stand in files beside the configuration.
    sys.path.insert(0, "")
    if isinstance(sys.stdout, TextIOWrapper):  # else Lightning's Rich bar ends a run where there is no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    first, *others = given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if first == "--version":
        sys.stdout.write(f"lr_callback {__version__}\n")
        sys.exit(0)
    if first in OWN:
        getattr(import_module(OWN[first]), f"{first}_command")(others)
    elif first in LIGHTNING or first.startswith("-"):
        import_module("lr_callback.commands.compression_cli").lightning_command(given)
    else:
        sys.stderr.write(_unknown(first))
        sys.exit(2)


def _unknown(name: str) -> str:
    """Return what is said of a command that there is not."""
    commands = (*LIGHTNING, *OWN)
    near = "".join(f"; did you mean `{one}`?" for one in difflib.get_close_matches(name, commands, n=1))
    return (
        f"usage: lr-callback {{{','.join(commands)}}} ...\n"
        f"error: a command must be one of {', '.join(commands)}, got {name!r}{near or '.'}\n"
    )
