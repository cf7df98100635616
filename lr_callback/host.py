"""Host: what is asked of a Trainer and its module, and refused where the answer will not do."""

from __future__ import annotations

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lr_callback.observe import Observation, observe


def is_smoke_test(trainer: Trainer) -> bool:
    """Return whether the run is a ``fast_dev_run``, which never reaches an epoch after the first."""
    return bool(getattr(trainer, "fast_dev_run", False))


def observe_example(trainer: Trainer, pl_module: LightningModule) -> Observation:
    """Observe the module on its own example input, on its device and in the run's precision.

    Raises:
        MisconfigurationException: If the module has none.
    """
    example = pl_module.example_input_array
    if example is None:
        raise MisconfigurationException(
            "LowRankCompression: cost='multiply_adds' at epoch 0 (where fast_dev_run compresses, too) must know an "
            "input before the first batch, and the module's `example_input_array` is not set. Set it, or compress "
            "at epoch 1 or later."
        )
    moved = move_data_to_device(example, pl_module.device)
    return observe(pl_module, trainer.precision_plugin.convert_input(moved))
