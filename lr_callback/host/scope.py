"""Scope: which layers of a network a run compresses, and how their ranks are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lr_callback.analysis import Analysis, analyze, survey
from lr_callback.host.strategies import processes_of
from lr_callback.importance import Importance
from lr_callback.methods import Method
from lr_callback.observe import Observation
from lr_callback.report import analysis_progress


@dataclass(frozen=True)
class Scope:
    """What the analyses of a run have in common.

    Args:
        method: that chooses the ranks.
        include: glob patterns of layer names; None: all.
        exclude: glob patterns of layer names that stay dense.
        embeddings: whether ``nn.Embedding`` layers are factorized, too.
    """

    method: Method
    include: list[str] | None = None
    exclude: list[str] | None = None
    embeddings: bool = False

    def check_budgets(self, pl_module: LightningModule, ratios: Iterable[float], unit: Observation | None) -> None:
        """Refuse fractions to keep that no choice of ranks meets.

        Args:
            pl_module: whose layers are priced; no weight is looked at.
            ratios: fractions to keep, in (0, 1].
            unit: calls that multiply-adds are counted on; None: costs are parameters.

        Raises:
            ValueError: If one is out of reach; the text gives the range.
        """
        prices = survey(pl_module, self.method, observation=unit, **self._layers)
        for keep_ratio in ratios:
            prices.allocate(keep_ratio)

    def analyze(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        unit: Observation | None,
        importance: Mapping[str, Importance] | None = None,
    ) -> Analysis:
        """Analyse the module as it stands, shared out over the processes of the run; show the progress in its bar."""
        with analysis_progress(trainer.progress_bar_callback) as progress:
            options = {"progress": progress, "processes": processes_of(trainer), **self._layers}
            return analyze(pl_module, self.method, observation=unit, importance=importance, **options)

    @property
    def _layers(self) -> dict[str, Any]:
        return {"include": self.include, "exclude": self.exclude, "embeddings": self.embeddings}
