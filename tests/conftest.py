"""What several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lr_callback.parallel import Workers, workers

# Tests run side by side: one thread each, in the processes that they start too, is faster than all threads each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Derandomized: a run shows the same examples everywhere; without a database it leaves no folder behind.
settings.register_profile("lr_callback", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("lr_callback")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference figures and trained networks beside the repository, or skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference" / "torchprune.json").is_file():
        pytest.skip("needs ../shared with reference/torchprune.json and data/cifar10_resnet20.pt")
    return folder


@pytest.fixture
def crew() -> Iterator[Workers]:
    """Open workers for the length of a test."""
    with workers() as opened:
        yield opened
