"""The metrics as functions: of one update, without a state."""

from __future__ import annotations

from lr_callback.metrics.functional.agreement import prediction_agreement as prediction_agreement
from lr_callback.metrics.functional.costs import kept_cost as kept_cost
from lr_callback.metrics.functional.layer_error import relative_layer_error as relative_layer_error
from lr_callback.metrics.functional.moments import second_moments as second_moments
from lr_callback.metrics.functional.ranks import effective_rank as effective_rank
from lr_callback.metrics.functional.ranks import stable_rank as stable_rank

__all__ = [
    "effective_rank",
    "kept_cost",
    "prediction_agreement",
    "relative_layer_error",
    "second_moments",
    "stable_rank",
]
