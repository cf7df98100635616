"""Study command: from a configuration to the runs, the files and the figure."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lr_callback.commands.answers import Parser
from lr_callback.commands.places import refusal_in
from lr_callback.commands.study.figure import draw
from lr_callback.commands.study.files import NAME, Store
from lr_callback.commands.study.plan import Plan, Run, Treatment
from lr_callback.commands.study.pruning import torch_pruning
from lr_callback.commands.study.rows import Row, by_network, choose_metric, in_percent, summary
from lr_callback.commands.study.runs import Laboratory
from lr_callback.observation.report import write

_OURS = {"callbacks", "devices", "num_nodes", "strategy", "logger", "default_root_dir", "fast_dev_run"}
_OURS |= {"max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "barebones", "plugins"}
_OURS |= {"enable_checkpointing", "enable_progress_bar", "enable_model_summary", "profiler"}
"""Arguments of the Trainer that a study sets itself, or has no use for."""

_DESCRIPTION = """Compare methods on one network, or on several: at every size and for every seed, right after the cut
and after the same epochs of training, with a dense control that is trained for as long. Runs that are in the folder are
not repeated.
"""


def study_command(arguments: Sequence[str], write: Callable[[str], None] = write) -> None:
    """Carry out a study; write its rows, its figure and its table.

    Args:
        arguments: of ``lr-callback study``; see its ``--help``.
        write: is given each line for the person who waits.
    """
    parser = study_parser()
    config = parser.parse_args(list(arguments))
    try:
        chosen = parser.instantiate_classes(config)
        plan, networks = _plan(chosen), _networks(chosen)
        store = Store(Path(chosen.output), _plain(config))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.refuse(error)
    with _told_once():
        laboratories = {name: _laboratory(parser, config, plan, store.folder, name) for name in networks}
        metric = _metric(parser, laboratories.values(), chosen.metric)
        try:
            rows = _carry_out(plan, laboratories, store, metric, write)
        except (ValueError, TypeError, OSError, MisconfigurationException) as error:
            refused = refusal_in(error)
            if refused is None:  # what goes wrong in a model's own code keeps its traceback
                raise
            parser.refuse(refused)
    write(f"\n{summary(rows, metric)}\n")
    _draw(rows, metric, store.folder / NAME, write)


def study_parser() -> Parser:
    """Return the parser of ``lr-callback study``."""
    parser: Parser = Parser(prog="lr-callback study", description=_DESCRIPTION)
    add = parser.add_argument
    add("--config", action="config", help="a YAML file with these arguments")
    parser.add_subclass_arguments(
        LightningModule, "model", required=False, help="the network and how it is trained and tested"
    )
    add("--networks", type=dict[str, LightningModule] | None, help="name -> such a model, to compare on several")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False, help="the data, if the model has none")
    add("--methods", type=dict[str, Treatment], default={}, help="name -> method, refit, ...: see Treatment")
    add("--keep_ratios", type=list[float], default=[0.5], help="fractions of the parameters to keep, in (0, 1)")
    add("--seeds", type=list[int], default=[0], help="of the runs")
    add("--epochs", type=int, default=0, help="of training after the cut; 0: none")
    add("--dense_epochs", type=int, default=0, help="of training before the cut; 0: the network comes trained")
    add("--metric", type=str | None, help="of the test, to compare by; by default an accuracy, else a loss")
    add("--output", type=str, default="study", help="the folder of all files")
    parser.add_class_arguments(Trainer, "trainer", skip=_OURS, instantiate=False, fail_untyped=False)
    return parser


def _plan(chosen: Namespace) -> Plan:
    plan = Plan(chosen.methods, chosen.keep_ratios, chosen.seeds, chosen.epochs, chosen.dense_epochs)
    if any(treatment.filter_pruning for treatment in plan.treatments.values()):
        torch_pruning()  # before the first run, not at its turn
    return plan


def _networks(chosen: Namespace) -> list[str]:
    """Return the names of the networks; one without a name, if there is one."""
    if (chosen.model is None) == (chosen.networks is None):
        found = "neither" if chosen.model is None else "both"
        raise ValueError(
            "either --model must name a LightningModule, for example lr_callback.recipes.ImageClassifier, or "
            f"--networks several by names of their own; found {found}."
        )
    names = [""] if chosen.networks is None else list(chosen.networks)
    if not names or not all(re.fullmatch(r"[\w.-]+", name) for name in names if chosen.networks is not None):
        raise ValueError(
            "`networks` must have names of letters, digits, '_', '-' and '.', which files are named by; found "
            f"{', '.join(map(repr, names)) or 'none'}."
        )
    return names


def _laboratory(parser: Parser, config: Namespace, plan: Plan, folder: Path, network: str) -> Laboratory:
    own = config.clone()
    if network:
        own["model"] = own["networks"][network]
    own["networks"] = None

    def make() -> tuple[LightningModule, LightningDataModule | None]:
        made = parser.instantiate_classes(own.clone())
        return made.model, made.data

    written = _plain(own)
    trainer = {name: value for name, value in written["trainer"].items() if value is not None}
    setting = {"model": written["model"], "data": written.get("data"), "trainer": trainer}
    return Laboratory(make, plan, setting, trainer, folder)


@contextmanager
def _told_once() -> Iterator[None]:
    """Show each warning once: every run would give the same ones, and Python forgets what it has shown."""
    show, seen = warnings.showwarning, set[str]()

    def show_new(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show_new
        yield


def _metric(parser: Parser, laboratories: Iterable[Laboratory], asked: str | None) -> str:
    """Return the metric to compare by, of all networks; what goes wrong in a model's own test keeps its traceback."""
    first, *others = (one.metrics() for one in laboratories)
    names = [name for name in first if all(name in other for other in others)]
    try:
        return choose_metric(names, asked)
    except ValueError as error:
        parser.refuse(error)


def _draw(rows: Sequence[Row], metric: str, path: Path, write: Callable[[str], None]) -> None:
    """Draw a figure of each network; where that cannot be done, say so when the rest is written, and end as failed."""
    files = f"{len(rows)} runs: {path}.json, {path}.csv"
    try:
        drawn = [
            str(draw(own, metric, path.with_name(f"{path.name}-{name}.png" if name else f"{path.name}.png")))
            for name, own in by_network(rows).items()
        ]
        write(", ".join([files, *drawn]))
    except ModuleNotFoundError as error:
        write(files)
        sys.exit(str(error))


def _plain(config: Namespace) -> dict[str, Any]:
    written: Mapping[str, Any] = config.clone().as_dict()
    return {name: value for name, value in written.items() if name != "config"}


def _carry_out(
    plan: Plan, laboratories: Mapping[str, Laboratory], store: Store, metric: str, write: Callable[[str], None]
) -> list[Row]:
    """Carry out the runs that are not done; whatever stops them, those before stay in the files."""
    rows: list[Row] = []
    runs = [(name, run) for name in laboratories for run in plan.runs()]
    for number, (name, run) in enumerate(runs, start=1):
        key = plan.key(run, laboratories[name].setting)
        before = store.done(key, run.name)
        found = replace(before or laboratories[name].run(run), network=name)
        if before is None:
            store.add(found)
        taken = "done before" if before is not None else f"{found.seconds:.1f} s"
        what = f"{name}, {run}" if name else str(run)
        write(f"[{number}/{len(runs)}] {what}: {_result(found, run, metric)} ({taken})")
        rows.append(found)
        store.write_csv(rows)
    return rows


def _result(row: Row, run: Run, metric: str) -> str:
    if row.reason is not None:
        return row.reason
    text = f"{metric} {_number(row.right_after[metric], metric)}"
    return text + (f", {_number(row.after[metric], metric)} after {row.epochs} epochs" if row.after else "")


def _number(value: float | None, metric: str) -> str:
    return "not finite" if value is None else f"{(100 if in_percent(metric) else 1) * value:.2f}"
