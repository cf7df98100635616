"""Low-rank compression of a network while it trains."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lr_callback import metrics as metrics
    from lr_callback.analysis.analyze import allocate as allocate
    from lr_callback.analysis.analyze import analyze as analyze
    from lr_callback.calibration.collect import collect_moments as collect_moments
    from lr_callback.calibration.effects import measure_effects as measure_effects
    from lr_callback.calibration.fisher import fisher_importance as fisher_importance
    from lr_callback.calibration.gains import batchnorm_importance as batchnorm_importance
    from lr_callback.callback import LowRankCompression as LowRankCompression
    from lr_callback.decisions.allocation import Allocation as Allocation
    from lr_callback.decisions.analysed import Analysis as Analysis
    from lr_callback.decisions.curves import Curves as Curves
    from lr_callback.decisions.factorization import Factorization as Factorization
    from lr_callback.decisions.methods import ALDS as ALDS
    from lr_callback.decisions.methods import ALDSK as ALDSK
    from lr_callback.decisions.methods import PCA as PCA
    from lr_callback.decisions.methods import ALDSError as ALDSError
    from lr_callback.decisions.methods import ALDSSimple as ALDSSimple
    from lr_callback.decisions.methods import EnergyThreshold as EnergyThreshold
    from lr_callback.decisions.methods import LRank as LRank
    from lr_callback.decisions.methods import Method as Method
    from lr_callback.decisions.methods import SingularValueThreshold as SingularValueThreshold
    from lr_callback.decisions.methods import UniformRank as UniformRank
    from lr_callback.edits.attention import split_attention_ as split_attention_
    from lr_callback.edits.surgery import SurgeryReport as SurgeryReport
    from lr_callback.edits.surgery import densify_ as densify_
    from lr_callback.edits.surgery import factorize_ as factorize_
    from lr_callback.files.checkpoint import restore_ as restore_
    from lr_callback.files.exporting import Exported as Exported
    from lr_callback.files.exporting import export as export
    from lr_callback.files.hook import prepare as prepare
    from lr_callback.files.loading import LowRankMixin as LowRankMixin
    from lr_callback.files.loading import load_from_checkpoint as load_from_checkpoint
    from lr_callback.layers import FactorizedConv1D as FactorizedConv1D
    from lr_callback.layers import FactorizedConv1d as FactorizedConv1d
    from lr_callback.layers import FactorizedConv2d as FactorizedConv2d
    from lr_callback.layers import FactorizedConv3d as FactorizedConv3d
    from lr_callback.layers import FactorizedConvTranspose1d as FactorizedConvTranspose1d
    from lr_callback.layers import FactorizedConvTranspose2d as FactorizedConvTranspose2d
    from lr_callback.layers import FactorizedConvTranspose3d as FactorizedConvTranspose3d
    from lr_callback.layers import FactorizedEmbedding as FactorizedEmbedding
    from lr_callback.layers import FactorizedLinear as FactorizedLinear
    from lr_callback.layers.attention import SplitAttention as SplitAttention
    from lr_callback.mathematics.distillation import distillation_loss as distillation_loss
    from lr_callback.mathematics.importance import Importance as Importance
    from lr_callback.observation.figures import plot_allocation as plot_allocation
    from lr_callback.observation.figures import plot_spectra as plot_spectra
    from lr_callback.observation.figures import plot_tradeoff as plot_tradeoff
    from lr_callback.repair.recalibrate import correct_biases_ as correct_biases_
    from lr_callback.repair.recalibrate import recalibrate_batchnorm_ as recalibrate_batchnorm_
    from lr_callback.repair.refit import refit_ as refit_
    from lr_callback.tuning.pointwise import pointwise_ as pointwise_
    from lr_callback.tuning.tune import tune as tune
    from lr_callback.tuning.tune import tune_ as tune_
    from lr_callback.tuning.tuned import Tuning as Tuning

__version__ = "0.1.0"
__all__ = [
    "ALDS",
    "ALDSError",
    "ALDSK",
    "ALDSSimple",
    "Allocation",
    "Analysis",
    "Curves",
    "EnergyThreshold",
    "Exported",
    "FactorizedConv1D",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedConvTranspose1d",
    "FactorizedConvTranspose2d",
    "FactorizedConvTranspose3d",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "Factorization",
    "Importance",
    "LRank",
    "LowRankCompression",
    "LowRankMixin",
    "Method",
    "PCA",
    "SingularValueThreshold",
    "SplitAttention",
    "SurgeryReport",
    "Tuning",
    "UniformRank",
    "allocate",
    "analyze",
    "batchnorm_importance",
    "collect_moments",
    "correct_biases_",
    "densify_",
    "distillation_loss",
    "export",
    "factorize_",
    "fisher_importance",
    "load_from_checkpoint",
    "measure_effects",
    "metrics",
    "plot_allocation",
    "plot_spectra",
    "plot_tradeoff",
    "pointwise_",
    "prepare",
    "recalibrate_batchnorm_",
    "refit_",
    "restore_",
    "split_attention_",
    "tune",
    "tune_",
]

_NAMES = {
    "lr_callback.analysis.analyze": ("allocate", "analyze"),
    "lr_callback.calibration.collect": ("collect_moments",),
    "lr_callback.calibration.effects": ("measure_effects",),
    "lr_callback.calibration.fisher": ("fisher_importance",),
    "lr_callback.calibration.gains": ("batchnorm_importance",),
    "lr_callback.callback": ("LowRankCompression",),
    "lr_callback.decisions.allocation": ("Allocation",),
    "lr_callback.decisions.analysed": ("Analysis",),
    "lr_callback.decisions.curves": ("Curves",),
    "lr_callback.decisions.factorization": ("Factorization",),
    "lr_callback.decisions.methods": (
        "ALDS",
        "ALDSError",
        "ALDSK",
        "ALDSSimple",
        "EnergyThreshold",
        "LRank",
        "Method",
        "PCA",
        "SingularValueThreshold",
        "UniformRank",
    ),
    "lr_callback.edits.attention": ("split_attention_",),
    "lr_callback.edits.surgery": ("SurgeryReport", "densify_", "factorize_"),
    "lr_callback.files.checkpoint": ("restore_",),
    "lr_callback.files.exporting": ("Exported", "export"),
    "lr_callback.files.hook": ("prepare",),
    "lr_callback.files.loading": ("LowRankMixin", "load_from_checkpoint"),
    "lr_callback.layers": (
        "FactorizedConv1D",
        "FactorizedConv1d",
        "FactorizedConv2d",
        "FactorizedConv3d",
        "FactorizedConvTranspose1d",
        "FactorizedConvTranspose2d",
        "FactorizedConvTranspose3d",
        "FactorizedEmbedding",
        "FactorizedLinear",
    ),
    "lr_callback.layers.attention": ("SplitAttention",),
    "lr_callback.mathematics.distillation": ("distillation_loss",),
    "lr_callback.mathematics.importance": ("Importance",),
    "lr_callback.observation.figures": ("plot_allocation", "plot_spectra", "plot_tradeoff"),
    "lr_callback.repair.recalibrate": ("correct_biases_", "recalibrate_batchnorm_"),
    "lr_callback.repair.refit": ("refit_",),
    "lr_callback.tuning.pointwise": ("pointwise_",),
    "lr_callback.tuning.tune": ("tune", "tune_"),
    "lr_callback.tuning.tuned": ("Tuning",),
}
"""Module -> the public names that it has."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = ("layers", "metrics")
"""Rooms that are there without being imported by a user."""


def _first_use(name: str) -> object:
    """Import on first use: torch and Lightning take seconds, and not every use needs them."""
    if name in _ROOMS:
        return import_module(f"lr_callback.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lr_callback' has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name]), name)
    if name == "LowRankCompression":
        import_module("lr_callback.host.packages").serve_imported_packages()
    return found


if not TYPE_CHECKING:  # to a type checker, which has the names from above, any other name would be one, too
    __getattr__ = _first_use


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
