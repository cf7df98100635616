"""Scope: which layers of a network a run compresses, and how their ranks are chosen."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import SparseAdam

from lr_callback.analysis.analyze import NothingToFactorizeError, analyze, survey, to_time
from lr_callback.calibration.fisher import WITHOUT
from lr_callback.common.table import wrap
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, amount
from lr_callback.decisions.goals import Goal, is_open
from lr_callback.decisions.methods import Method, best_method, check_method
from lr_callback.edits.optimizers import optimizers_in, with_inner
from lr_callback.host.events import check_flags
from lr_callback.host.strategies import processes_of
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers
from lr_callback.model.observe import Observation
from lr_callback.model.overrides import read_overrides
from lr_callback.model.patterns import check_patterns
from lr_callback.model.pricing import Prices
from lr_callback.observation.progress import progress_line
from lr_callback.units.latency import Wanted


@dataclass(frozen=True)
class Scope:
    """What the analyses of a run have in common.

    Args:
        chosen: the method that chooses the ranks; None: the best one for what can be measured.
        include: glob patterns of layer names; None: all.
        exclude: glob patterns of layer names that stay dense.
        embeddings: whether ``nn.Embedding`` layers are factorized, too.
        overrides: pattern of layers -> what each becomes, whatever the others do.

    Raises:
        TypeError: If ``chosen`` is no method, ``embeddings`` no switch, a pattern no text, or ``overrides`` no mapping.
        ValueError: If an override is none, or out of range.
    """

    chosen: Method | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    embeddings: bool = False
    overrides: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_method(self.chosen)
        check_patterns(include=self.include, exclude=self.exclude)
        check_flags(self, "embeddings")
        read_overrides(self.overrides)

    @property
    def method(self) -> Method:
        """The method, as it is where the training can be run for a calibration."""
        return best_method() if self.chosen is None else self.chosen

    @property
    def without_effects(self) -> Scope:
        """The same where outputs cannot be compared: a method that was left open then counts all layers alike."""
        return self if self.chosen is not None else replace(self, chosen=best_method(effects=False))

    @property
    def without_calibration(self) -> Scope:
        """The same where no batches can be had: a method that was left open needs none."""
        return self if self.chosen is not None else replace(self, chosen=check_method(None))

    def to_time(self, pl_module: LightningModule) -> dict[str, Wanted]:
        """Return what is to be measured of each layer for a budget in time."""
        return to_time(pl_module, self.method, **self._layers)

    def check_budgets(self, pl_module: LightningModule, goals: Iterable[Goal], prices: Sequence[Prices]) -> Analysis:
        """Refuse fractions to keep that no choice of ranks meets; an error or an accuracy can always be met.

        Returns the survey by which that is known, for :meth:`reach`.

        Args:
            pl_module: whose layers are priced; no weight is looked at.
            goals: see :mod:`lr_callback.decisions.goals`.
            prices: the units of the budgets.

        Raises:
            ValueError: If one is out of reach; the text gives the range.
        """
        surveyed = survey(pl_module, self.method, prices=prices, **self._layers)
        for goal in goals:
            if not is_open(goal):
                surveyed.allocate(goal)
        return surveyed

    def check_known(self, pl_module: LightningModule, goals: Iterable[Goal]) -> None:
        """Refuse what cannot be met in a unit that needs no batch to be counted on, where another one does.

        Raises:
            ValueError: If one is out of reach.
        """
        for goal in goals:
            for unit, ratio in goal.items() if isinstance(goal, Mapping) and not is_open(goal) else ():
                if unit not in OBSERVED:
                    self.check_budgets(pl_module, [{unit: ratio}], [Prices(unit)])

    def reach(self, pl_module: LightningModule, surveyed: Analysis, seen: Observation | None) -> str:
        """Say what of a module can be kept at least, in each unit, or why that is not known.

        Args:
            pl_module: whose layers are priced; no weight is looked at.
            surveyed: of it, in the units of the budgets.
            seen: of a run, if there was one: multiply-adds are known then.
        """
        known = {unit: (surveyed.smallest_in(unit), dense) for unit, dense in surveyed.dense_costs.items()}
        counted = () if seen is None else ("multiply_adds",)
        # A budget beside others may lack layers that one of these leaves dense.
        several = {*known} - {ACTIVATION_MEMORY} if len(known) > 1 else set()
        for unit in dict.fromkeys((*known, "parameters", "bytes", *counted)):
            if unit not in known or unit in several:
                known |= self._alone(pl_module, Prices(unit, seen))
        shares = {unit: (least / dense, dense) for unit, (least, dense) in known.items() if dense}
        ranges = ", ".join(f"{100 * share:.1f} % of {amount(unit, dense)}" for unit, (share, dense) in shares.items())
        alone = ", each alone" if several else ""
        return wrap(f"Low-rank compression can go down to {ranges}{alone}. {_no_range(known)}".strip())

    def _alone(self, pl_module: LightningModule, price: Prices) -> dict[str, tuple[int, int]]:
        """Return by its unit the smallest cost, and that of the dense module, for a budget in one that is not asked."""
        try:
            found = survey(pl_module, self.method, prices=price, **self._layers)
        except NothingToFactorizeError:  # in this unit
            dense = price.of_model(pl_module)
            return {price.unit: (dense, dense)}
        except ValueError:  # an override that is out of range in this unit: the run does not pay in it
            return {}
        return {price.unit: (found.smallest_cost, found.dense_cost)}

    def check_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers that would stop a compression, before the training.

        Raises:
            MisconfigurationException: If an embedding that may be factorized is trained by ``SparseAdam``, which would
                stop at the gradient of its decoder; or if errors are weighted by what no optimizer keeps.
        """
        every = with_inner([*trainer.optimizers, *optimizers_in(pl_module)])
        if self.method.error == "fisher" and all(type(one) in WITHOUT for one in every):
            raise MisconfigurationException(
                "LowRankCompression: error='fisher' weighs layers by the mean squared gradients that Adam, AdamW or "
                f"RMSprop keep, and {', '.join(type(one).__name__ for one in every) or 'no optimizer'} keeps none. "
                "Train with one of these, or choose error='activation'."
            )
        self._check_sparse(trainer, pl_module)

    def _check_sparse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.embeddings:
            return
        sparse = [one for one in with_inner(trainer.optimizers) if isinstance(one, SparseAdam)]
        held = {id(weight) for one in sparse for group in one.param_groups for weight in group["params"]}
        found = find_layers(pl_module, self.include, self.exclude).layers.items()
        names = [name for name, layer in found if isinstance(layer, nn.Embedding) and id(layer.weight) in held]
        if names:
            raise MisconfigurationException(
                "LowRankCompression: an embedding that is factorized must have an optimizer that takes gradients of "
                f"both kinds, the decoder's is dense; SparseAdam, which trains {', '.join(names[:3])}, does not. Name "
                "it in `exclude`, or train it with SGD or Adagrad."
            )

    def analyze(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prices: Sequence[Prices],
        importance: Mapping[str, Importance] | None = None,
    ) -> Analysis:
        """Analyse the module as it stands, shared out over the processes of the run; show the progress in its bar."""
        with progress_line(trainer) as progress:
            options = {"progress": progress, "processes": processes_of(trainer), **self._layers}
            return analyze(pl_module, self.method, prices=prices, importance=importance, **options)

    @property
    def _layers(self) -> dict[str, Any]:
        own = {"include": self.include, "exclude": self.exclude}
        return {**own, "embeddings": self.embeddings, "overrides": self.overrides}


def _no_range(known: Container[str]) -> str:
    """Say why the other units have no range: none is below the dense network, or it takes a run, or minutes."""
    reasons = {
        "multiply_adds": "multiply-adds are known of a network that runs on its `example_input_array`",
        ACTIVATION_MEMORY: "activation memory falls below the dense network's only where autocast copies weights",
        LATENCY: "time is measured for a budget in latency",
    }
    told = "; ".join(reason for unit, reason in reasons.items() if unit not in known)
    return f"{told[:1].upper()}{told[1:]}." if told else ""
