"""What several recipe tests share."""

from pathlib import Path

import pytest


def shared_data() -> Path | None:
    """Return the folder of CIFAR-10 images and trained networks beside the repository, if it is there."""
    folder = Path(__file__).resolve().parents[4] / "shared" / "data"
    return folder if (folder / "cifar10_resnet20.pt").is_file() else None


@pytest.fixture
def real_data() -> Path:
    """Skip the test where the real images are not at hand; they are too large to be kept in the repository."""
    folder = shared_data()
    if folder is None:
        pytest.skip("needs ../shared/data with CIFAR-10 and trained networks")
    return folder
