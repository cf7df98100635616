"""Export command: from a checkpoint on the disk to a file for another program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from jsonargparse import Namespace
from torch import nn

from lr_callback.commands.answers import Parser
from lr_callback.commands.from_checkpoint import (
    add_checkpoint,
    add_model,
    call_of,
    check_model,
    check_writable,
    parsed,
)
from lr_callback.commands.run_files import weights_in
from lr_callback.common.table import listed
from lr_callback.decisions.allocation import Allocation
from lr_callback.files.checkpoint import restore_
from lr_callback.files.exporting import Exported, export
from lr_callback.files.formats import FORMATS, check_format
from lr_callback.files.noted import in_the_names_of, noted_allocation
from lr_callback.layers import FactorizedLayer
from lr_callback.model.find import factorized_in
from lr_callback.observation.report import write


def export_command(arguments: Sequence[str]) -> None:
    """Write a checkpoint's model to a file, and tell what was written.

    Args:
        arguments: of ``lr-callback export``; see its ``--help``.
    """
    parser = export_parser()
    try:
        exported = _export(parsed(parser, arguments))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.refuse(error)
    write(str(exported))


def export_parser() -> Parser:
    """Return the parser of ``lr-callback export``."""
    parser: Parser = Parser(prog="lr-callback export", description="Write a checkpoint's model for another program.")
    add = parser.add_argument
    add_checkpoint(parser)
    add("--format", type=str | None, help=f"one of {', '.join(FORMATS)}; by default by the suffix of --output")
    add("--output", type=str | None, help="the file; by default beside the checkpoint, with the suffix of the format")
    add_model(parser)
    add("--dynamic_batch", type=bool, default=True, help="whether the file takes any number of rows")
    return parser


def _export(chosen: Namespace) -> Exported:
    checkpoint = Path(chosen.checkpoint)
    if chosen.format is None and chosen.output is None:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got none.")
    if chosen.format not in (None, *FORMATS):
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {chosen.format}.")
    check_model(chosen)
    output = Path(chosen.output or checkpoint.with_suffix(FORMATS[chosen.format].suffix))
    named = chosen.format or next((name for name, row in FORMATS.items() if row.suffix == output.suffix), None)
    check_writable("--output", output, [output.suffix if named is None else FORMATS[named].suffix], checkpoint)
    check_format(chosen.format, output)
    restore_(chosen.model, checkpoint)
    needs_example = named is not None and FORMATS[named].open is not None
    model, example = call_of(chosen) if needs_example else (chosen.model, None)
    return export(
        model,
        output,
        format=chosen.format,
        example_input=None if example is None else (example.named or example.arguments),
        dynamic_batch=chosen.dynamic_batch,
        allocation=_allocation(checkpoint, model) if named == "safetensors" else None,
    )


def _written(checkpoint: Path) -> Allocation | None:
    """Return the allocation that the callback wrote into a checkpoint, or `export` into a header."""
    loaded = weights_in(checkpoint)
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
            f"{listed(factorized_in(model)) or 'none'}; the file is written without it, and restores by its weights. "
            "If it is to have one, export the checkpoint of the run that made these layers.",
            stacklevel=2,
        )
    return found
