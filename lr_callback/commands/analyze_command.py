"""Analyze command: what a model would become, before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lr_callback.analysis.analyze import analyze
from lr_callback.commands.answers import Parser
from lr_callback.commands.from_checkpoint import check_writable
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.methods import Method
from lr_callback.observation.report import write


def analyze_command(arguments: Sequence[str]) -> None:
    """Print what a model would become, and the range that can be reached; nothing is changed.

    Args:
        arguments: of ``lr-callback analyze``; see its ``--help``.
    """
    parser: Parser = Parser(prog="lr-callback analyze", description="Show what compression would make of a model.")
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
    parser.add_argument("--json", type=str | None, help="a file to write the allocation to, .json")
    chosen = parser.instantiate_classes(parser.parse_args(list(arguments)))
    if chosen.model is None:
        parser.error("--model must name a model, for example --model lr_callback.recipes.CifarResNet; got none.")
    try:
        if chosen.json is not None:
            check_writable("--json", Path(chosen.json), [".json"])
        choice = {name: chosen[name] for name in ("include", "exclude", "embeddings", "overrides")}
        found = analyze(chosen.model, chosen.method, **choice)
        allocation: Allocation = found.allocate(chosen.keep_ratio)
    except (TypeError, ValueError, OSError) as error:
        parser.refuse(error)
    write(str(allocation))
    low, high = found.reachable
    write(f"reachable: keep_ratio from {low:.4f} to {high:.0f}, of {found.dense_cost:,} {found.unit}")
    if chosen.json is not None:
        allocation.to_json(chosen.json)
