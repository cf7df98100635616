"""Feasibility: what budgets a run can meet, and how far down its network can go, said before the training."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from lightning.pytorch import LightningModule, Trainer

from lr_callback.analysis.analyze import NothingToFactorizeError
from lr_callback.common.table import wrap
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, amount
from lr_callback.decisions.goals import Goal, is_open
from lr_callback.host.counting import Counting
from lr_callback.host.scope import Scope
from lr_callback.model.observe import Observation
from lr_callback.model.pricing import Prices
from lr_callback.observation.report import show


def check_goals(
    trainer: Trainer, pl_module: LightningModule, scope: Scope, counting: Counting, goals: Iterable[Goal], tells: bool
) -> None:
    """Refuse fractions to keep that no choice of ranks meets; an error or an accuracy can always be met.

    Where budgets wait for a batch, those in units that need none are looked at; the others once it was seen.

    Args:
        trainer: of the run.
        pl_module: whose layers are priced; no weight is looked at.
        scope: which of them, and by which method.
        counting: what is known of a run of it.
        goals: see :mod:`lr_callback.decisions.goals`.
        tells: whether to say how far down the network can go.

    Raises:
        ValueError: If one is out of reach; the text gives the range.
    """
    listed = list(goals)
    if counting.is_due:
        _check_unobserved(pl_module, scope, listed)
        return
    surveyed = scope.survey(pl_module, counting.prices)
    for goal in listed:
        if not is_open(goal):
            surveyed.allocate(goal)
    if tells and listed:
        show(trainer, _reach(pl_module, scope, surveyed, counting.glance(trainer, pl_module)))


def _check_unobserved(pl_module: LightningModule, scope: Scope, goals: Iterable[Goal]) -> None:
    """Refuse what cannot be met in a unit that needs no batch to be counted on, where another one does."""
    for goal in goals:
        for unit, ratio in goal.items() if isinstance(goal, Mapping) and not is_open(goal) else ():
            if unit not in OBSERVED:
                scope.survey(pl_module, Prices(unit)).allocate({unit: ratio})


def _reach(pl_module: LightningModule, scope: Scope, surveyed: Analysis, seen: Observation | None) -> str:
    """Say what of a module can be kept at least, in each unit, or why that is not known.

    Args:
        pl_module: whose layers are priced.
        scope: of the run.
        surveyed: of the module, in the units of the budgets.
        seen: of a run, if there was one: multiply-adds are known then.
    """
    known = {unit: (surveyed.smallest_in(unit), dense) for unit, dense in surveyed.dense_costs.items()}
    counted = () if seen is None else ("multiply_adds",)
    # A budget beside others may lack layers that one of these leaves dense.
    several = {*known} - {ACTIVATION_MEMORY} if len(known) > 1 else set()
    for unit in dict.fromkeys((*known, "parameters", "bytes", *counted)):
        if unit not in known or unit in several:
            known |= _alone(pl_module, scope, Prices(unit, seen))
    shares = {unit: (least / dense, dense) for unit, (least, dense) in known.items() if dense}
    ranges = ", ".join(f"{100 * share:.1f} % of {amount(unit, dense)}" for unit, (share, dense) in shares.items())
    alone = ", each alone" if several else ""
    return wrap(f"Low-rank compression can go down to {ranges}{alone}. {_no_range(known)}".strip())


def _alone(pl_module: LightningModule, scope: Scope, price: Prices) -> dict[str, tuple[int, int]]:
    """Return by its unit the smallest cost, and that of the dense module, for a budget in it alone."""
    try:
        found = scope.survey(pl_module, price)
    except NothingToFactorizeError:  # in this unit
        dense = price.of_model(pl_module)
        return {price.unit: (dense, dense)}
    except ValueError:  # an override that is out of range in this unit: the run does not pay in it alone
        return {}
    return {price.unit: (found.smallest_cost, found.dense_cost)}


def _no_range(known: Container[str]) -> str:
    """Say why the other units have no range: none is below the dense network, or it takes a run, or minutes."""
    reasons = {
        "multiply_adds": "multiply-adds are known of a network that runs on its `example_input_array`",
        ACTIVATION_MEMORY: "activation memory falls below the dense network's only where autocast copies weights",
        LATENCY: "time is measured for a budget in latency",
    }
    told = "; ".join(reason for unit, reason in reasons.items() if unit not in known)
    return f"{told[:1].upper()}{told[1:]}." if told else ""
