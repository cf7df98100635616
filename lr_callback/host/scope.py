"""Scope: which layers of a network a run compresses, and how their ranks are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import SparseAdam

from lr_callback.analysis.analyze import analyze, survey, to_time
from lr_callback.calibration.fisher import WITHOUT
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.methods import Method, best_method, check_method
from lr_callback.edits.optimizers import optimizers_in, with_inner
from lr_callback.host.events import check_flags
from lr_callback.host.strategies import processes_of
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers
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

    def survey(self, pl_module: LightningModule, prices: Prices | Sequence[Prices]) -> Analysis:
        """Find the layers of a module and their prices; no weight is looked at.

        Raises:
            ValueError: If there is nothing to factorize, or an override cannot be had in one of the units.
        """
        return survey(pl_module, self.method, prices=prices, **self._layers)

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
