"""Analyze command: what a model would become, before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from lr_callback.analysis.analyze import analyze_for
from lr_callback.commands.answers import Parser
from lr_callback.commands.from_checkpoint import check_writable, random_input
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.costs import OBSERVED, amount
from lr_callback.decisions.goals import Goal, check_goal, one_goal, units_of
from lr_callback.decisions.methods import Method
from lr_callback.observation.report import write
from lr_callback.units.latency import NoisyClockError
from lr_callback.units.own_cost import read_cost


def _add_goal(parser: Parser) -> None:
    add = parser.add_argument
    add("--keep_ratio", type=float | None, help="fraction of the whole model to keep, in (0, 1]; by default 0.5")
    add("--budget", type=dict[str, float] | None, help="in its place several that all hold: unit -> fraction")
    add("--max_error", type=float | None, help="in its place the largest error of a layer, in (0, 1]")
    cost = "unit of keep_ratio: parameters, bytes, multiply_adds, latency, or the path of a function of your own"
    add("--cost", type=str, default="parameters", help=cost)


def _parser() -> Parser:
    parser: Parser = Parser(prog="lr-callback analyze", description="Show what compression would make of a model.")
    parser.add_argument("--config", action="config", help="a YAML file with these arguments")
    parser.add_subclass_arguments(nn.Module, "model", help="the model, by import path and its arguments")
    _add_goal(parser)
    parser.add_subclass_arguments(Method, "method", required=False, help="how to choose; by default ALDS")
    parser.add_argument("--input_shape", type=str | None, help="of an input of random numbers, as 1,3,32,32")
    parser.add_argument("--include", type=list[str] | None, help="patterns; only these layers are factorized")
    parser.add_argument("--exclude", type=list[str] | None, help="patterns of layers that stay dense")
    parser.add_argument("--embeddings", type=bool, default=False, help="factorize nn.Embedding layers, too")
    parser.add_argument(
        "--overrides", type=dict[str, Any] | None, help="pattern -> dense, {keep_ratio: ...}, {rank: ...}"
    )
    parser.add_argument("--json", type=str | None, help="a file to write the allocation to, .json")
    return parser


def analyze_command(arguments: Sequence[str]) -> None:
    """Print what a model would become, and the range that can be reached; nothing is changed.

    Args:
        arguments: of ``lr-callback analyze``; see its ``--help``.
    """
    parser = _parser()
    config = parser.parse_args(list(arguments))
    if config.model is None:
        parser.error("--model must name a model, for example --model lr_callback.recipes.CifarResNet; got none.")
    try:
        chosen = parser.instantiate_classes(config)
        if chosen.json is not None:
            check_writable("--json", Path(chosen.json), [".json"])
        goal, found = _analysed(chosen)
        allocation = found.allocate(goal)
    except (TypeError, ValueError, OSError, NoisyClockError) as error:
        parser.refuse(error)
    write(str(allocation))
    write(_reachable(found))
    if chosen.json is not None:
        allocation.to_json(chosen.json)


def _analysed(chosen: Namespace) -> tuple[Goal, Analysis]:
    """Return what is asked for, and what is known of the model in its units."""
    cost = read_cost(chosen.cost)
    goal = check_goal(one_goal(chosen.keep_ratio, chosen.budget, chosen.max_error, cost))
    layers = {name: chosen[name] for name in ("include", "exclude", "embeddings", "overrides")}
    example = None if chosen.input_shape is None else random_input(chosen.input_shape)
    if example is None and not OBSERVED.isdisjoint(units_of(goal, cost)):
        example = getattr(chosen.model, "example_input_array", None)
    return goal, analyze_for(goal, chosen.model, chosen.method, cost=cost, example_input=example, layers=layers)


def _reachable(found: Analysis) -> str:
    """Return the range that can be reached, in each unit."""
    units = found.dense_costs.items()
    if len(units) == 1:
        (unit, dense), low = next(iter(units)), found.reachable[0]
        return f"reachable: keep_ratio from {low:.4f} to 1, of {amount(unit, dense)}"
    least = ", ".join(f"{found.smallest_in(unit) / dense:.4f} of {amount(unit, dense)}" for unit, dense in units)
    return f"reachable, each alone with these layers: {least}"
