"""Environment: what figures were measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lr_callback.units.latency.files import processor

PACKAGES = ("lr_callback", "torch", "torchvision", "lightning", "torchmetrics", "numpy", "torch-pruning")


def environment() -> dict[str, Any]:
    """Return the versions, the processor and the number of threads.

    Example::

        >>> environment()["torch"] == torch.__version__.partition("+")[0]
        True
    """
    return {
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
