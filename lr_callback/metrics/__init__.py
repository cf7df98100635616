"""Metrics of low-rank compression for torchmetrics: alone, in a ``MetricCollection``, in a LightningModule."""

from __future__ import annotations

from lr_callback.mathematics.moments import SecondMoments as SecondMoments
from lr_callback.metrics.agreement import PredictionAgreement as PredictionAgreement
from lr_callback.metrics.kept_cost import KeptCost as KeptCost
from lr_callback.metrics.layer_error import RelativeLayerError as RelativeLayerError
from lr_callback.metrics.ranks import EffectiveRank as EffectiveRank
from lr_callback.metrics.ranks import StableRank as StableRank

__all__ = [
    "EffectiveRank",
    "KeptCost",
    "PredictionAgreement",
    "RelativeLayerError",
    "SecondMoments",
    "StableRank",
]
