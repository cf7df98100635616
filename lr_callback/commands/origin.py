"""Origin: how a compressed network was made, in names and values for a person, and what can be done with it next."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lr_callback import __version__
from lr_callback.callback import LowRankCompression
from lr_callback.commands.recorded import Recorded
from lr_callback.decisions.costs import spoken
from lr_callback.units.latency import device_facts


def device_of(device: torch.device) -> str:
    """Return the name of a device, and how it is used."""
    facts = device_facts(device)
    threads = f", threads: {facts['threads']}" if "threads" in facts else ""
    return f"{facts['name']} ({device.type}{threads})"


def origin_of(checkpoint: Path, said: Recorded) -> dict[str, str]:
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
    return ", ".join(f"at most {part:.1%} of the {spoken(unit)}" for unit, part in asked.items())


def arguments_of(written: Mapping[str, Any]) -> str:
    """Return the callback's arguments in a configuration that are not its defaults, as YAML."""
    trainer = written.get("trainer")
    listed = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    entries = [one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, Mapping)]
    name = LowRankCompression.__name__
    own = [one.get("init_args") for one in entries if str(one.get("class_path")).endswith(name)]
    found = own[0] if own else written.get("compress")
    if not isinstance(found, Mapping):
        return ""
    defaults = {key: one.default for key, one in inspect.signature(LowRankCompression).parameters.items()}
    given = {key: value for key, value in found.items() if key not in defaults or value != defaults[key]}
    return yaml.safe_dump(given, sort_keys=False) if given else ""


def commands_for(checkpoint: Path, named: Sequence[str] = ()) -> dict[str, str]:
    """Return what can be done with a checkpoint next -> the command line.

    Args:
        checkpoint: the file.
        named: words of a command line that say how the model is made, where its files do not.
    """
    quoted = shlex.join([str(checkpoint), *named])
    return {
        "A file for another program": f"lr-callback export --checkpoint {quoted} --format onnx",
        "The forms of its layers that are fastest on a device": f"lr-callback tune --checkpoint {quoted}",
    }
