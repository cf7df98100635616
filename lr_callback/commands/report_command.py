"""Report command: from a checkpoint on the disk to a page that says what its compression did."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from lr_callback import __version__
from lr_callback.callback import LowRankCompression
from lr_callback.commands.from_checkpoint import (
    add_checkpoint,
    add_model,
    check_writable,
    configuration,
    described_run,
    device_named,
    parsed,
    weights_in,
)
from lr_callback.commands.measured import evaluated, evaluator, networks, sized, timed_stages, times_of
from lr_callback.commands.recorded import Recorded, recorded
from lr_callback.commands.snippet import loading_code
from lr_callback.page.facts import Facts, Missing
from lr_callback.page.page import page
from lr_callback.units.latency import device_facts

Found = TypeVar("Found")

_WAY = "--config config.yaml of the run, or --model my_module.MyModule"
_ASKED = ("--model", "--data", "--config", "--input_shape", "--device")
"""Arguments that name what is measured."""


def report_command(arguments: Sequence[str]) -> str:
    """Write the page of a checkpoint.

    Args:
        arguments: of ``lr-callback report``; see its ``--help``.

    Returns:
        Where it is, and what it lacks.
    """
    parser = report_parser()
    try:
        return _report(*_read(parser, arguments))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))


def report_parser(exit_on_error: bool = True) -> ArgumentParser:
    """Return the parser of ``lr-callback report``.

    Args:
        exit_on_error: whether a wrong command line ends the process; else it raises.
    """
    description = "Write one HTML page that says what the compression of a checkpoint did."
    parser = ArgumentParser(prog="lr-callback report", description=description, exit_on_error=exit_on_error)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--output", type=str | None, help="the page; by default beside the checkpoint, with the suffix .html")
    add("--device", type=str | None, help="where it is measured, as cpu or cuda:0; by default where Lightning would")
    add_model(parser)
    return parser


class _Attempts:
    """What is tried, and what the page goes without.

    Args:
        arguments: the command line. What a user names and cannot be had is an error, and not a page without it.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._names = {one.partition("=")[0].partition(".")[0] for one in arguments}
        self.missing: list[Missing] = []

    def are_asked(self, *names: str) -> bool:
        """Return whether one of some arguments is given."""
        return not self._names.isdisjoint(names)

    def make(self, what: str, way: str, run: Callable[[], Found], *asked: str) -> Found | None:
        """Return what a call returns; if it raises, note that the page goes without.

        Args:
            what: it is.
            way: to have it.
            run: the call.
            asked: arguments; with one of them an error is raised.
        """
        try:
            return run()
        except Exception as error:  # whatever a user's model and data raise
            if self.are_asked(*asked):
                raise
            self.missing.append(Missing(what, _told(error), way))
            return None


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())[:400]}"


def _read(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, _Attempts]:
    """Read the command line, and how the run made its model and data; what of that fails is told in the page."""
    attempts = _Attempts(arguments)
    if attempts.are_asked(*_ASKED):
        return parsed(parser, arguments), attempts
    found = attempts.make(
        "times, multiply-adds and accuracies", _WAY, lambda: parsed(report_parser(exit_on_error=False), arguments)
    )
    # A wrong command line ends here.
    return found or parser.parse_args(list(arguments)), attempts


def _report(chosen: Namespace, attempts: _Attempts) -> str:
    checkpoint = Path(chosen.checkpoint)
    loaded = weights_in(checkpoint)
    said = recorded(checkpoint, loaded)
    output = Path(chosen.output or checkpoint.with_suffix(".html"))
    check_writable("--output", output, checkpoint)
    device = None if chosen.device is None else device_named(chosen.device)
    written = configuration(checkpoint, chosen.config)
    facts = Facts(
        str(checkpoint),
        said.allocation,
        said.stages(),
        origin=_origin(checkpoint, said),
        arguments=_arguments(written),
        loading=loading_code(described_run(checkpoint, chosen.config, None).get("model"), checkpoint),
        commands=_commands(checkpoint),
    )
    facts = _measured(facts, chosen, said, written, device, attempts)
    facts = replace(facts, missing=tuple(attempts.missing))
    _write(output, page(facts))
    return "\n".join([f"report: {output}", *map(str, facts.missing)])


def _measured(
    facts: Facts,
    chosen: Namespace,
    said: Recorded,
    written: Mapping[str, Any],
    device: torch.device | None,
    attempts: _Attempts,
) -> Facts:
    """Return the facts with what is measured, where there is a model, and data."""
    if chosen.model is None:
        if not attempts.missing:
            why = "the file does not say how its model is made, and there is no config.yaml of the run above it"
            attempts.missing.append(Missing("times, multiply-adds and accuracies", why, _WAY))
        return facts
    files = {**{name: path for name, path in said.snapshots.items() if name != "final"}, "now": Path(chosen.checkpoint)}
    models = attempts.make(
        "times, multiply-adds and accuracies", _WAY, lambda: networks(chosen.model, files), "--model", "--config"
    )
    if models is None:
        return facts
    trainer = evaluator(written, device)
    stages = sized(facts.stages, models)
    metrics = attempts.make(
        "accuracies",
        "--data my_module.MyData",
        lambda: evaluated(stages, models, chosen.data, files, trainer),
        "--data",
    )
    if metrics is not None and "dense" not in files:
        why = "there is no snapshot from before the cut"
        way = "LowRankCompression(snapshots=True) in the next run; lr-callback fit does so by itself"
        attempts.missing.append(Missing("accuracies of the network before", why, way))
    stages = metrics or stages
    where = trainer.strategy.root_device
    times = attempts.make(
        "times and multiply-adds", "--input_shape 1,3,32,32", lambda: times_of(chosen, models, where), "--input_shape"
    )
    if times is None:
        return replace(facts, stages=stages)
    stages = timed_stages(stages, times)
    origin = {**facts.origin, "measured on": _device(where)}
    return replace(facts, stages=stages, spread=times.spread, batch=times.batch, origin=origin)


def _device(device: torch.device) -> str:
    facts = device_facts(device)
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return f"{facts['name']} ({device.type}{threads})"


def _origin(checkpoint: Path, said: Recorded) -> dict[str, str]:
    """Return how the network was made: name -> value."""
    allocation = said.allocation
    return {
        "method": _call(allocation.method) or "not known",
        "asked": _asked(said),
        "compressed at the start of epochs": ", ".join(map(str, said.record.applied)) or "not known",
        f"{allocation.error} error of a layer": f"{allocation.worst_error:.3f} at most, "
        f"{allocation.mean_error:.3f} on average",
        **said.training,
        **said.scores,
        "checkpoint": f"{checkpoint.stat().st_size:,} bytes, with all that a training needs to go on",
        "page made by": f"lr_callback {__version__}, torch {torch.__version__}",
    }


def _call(method: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in method.items() if name != "name")
    return f"{method['name']}({given})" if "name" in method else given


def _asked(said: Recorded) -> str:
    allocation = said.allocation
    if allocation.max_error is not None:
        return f"no layer errs by more than {allocation.max_error:g}"
    asked = {allocation.unit: allocation.budget / allocation.dense_cost}
    asked |= {unit: one.budget / one.dense_cost for unit, one in allocation.others.items()}
    return ", ".join(f"at most {part:.1%} of the {unit.replace('_', '-')}" for unit, part in asked.items())


def _arguments(written: Mapping[str, Any]) -> str:
    """Return the callback's arguments in a configuration that are not its defaults, as YAML."""
    listed = (written.get("trainer") or {}).get("callbacks") or []
    entries = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    name = LowRankCompression.__name__
    own = [one.get("init_args") for one in entries if str(one.get("class_path")).endswith(name)]
    found = own[0] if own else written.get("compress")
    if not isinstance(found, Mapping):
        return ""
    defaults = {key: one.default for key, one in inspect.signature(LowRankCompression).parameters.items()}
    given = {key: value for key, value in found.items() if key not in defaults or value != defaults[key]}
    return yaml.safe_dump(given, sort_keys=False) if given else ""


def _commands(checkpoint: Path) -> dict[str, str]:
    quoted = shlex.quote(str(checkpoint))
    return {
        "A file for another program": f"lr-callback export --checkpoint {quoted} --format onnx",
        "The forms of its layers that are fastest on a device": f"lr-callback tune --checkpoint {quoted}",
    }


def _write(path: Path, text: str) -> None:
    """Write the page, whole or not at all."""
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        part.write_text(text, encoding="utf-8")
        part.replace(path)
