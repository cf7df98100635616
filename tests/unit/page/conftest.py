"""Facts of a small compression, as a page is told them."""

from dataclasses import replace

import pytest

from lr_callback import Allocation, Factorization
from lr_callback.observation.report import Stage
from lr_callback.page.facts import Facts


def allocation_of(count=2, prefix="layer"):
    """Return an allocation of so many layers, the last of which stays dense."""
    names = [f"{prefix}{index}" for index in range(count)]
    choice = Factorization("kernel_in_encoder", 2, 3, 0.25, 40, 100)
    layers = {name: choice if name != names[-1] else None for name in names}
    return Allocation(layers, {}, {name: (8, 4 + index, 3, 3) for index, name in enumerate(names)}, 140, 200, 150, 0.75)


@pytest.fixture
def allocated():
    return allocation_of


@pytest.fixture
def facts():
    before = Stage("dense, before", {"val_accuracy": 0.9, "val_loss": 0.5}, 200, 4000, 10_000, 2.0, 0.01)
    after = Stage("this checkpoint", {"val_accuracy": 0.88, "val_loss": 0.7}, 140, 2000, 6_000, 3.0, 0.02)
    return Facts("runs/last.ckpt", allocation_of(), (before, after), batch="8x4 float32")


@pytest.fixture
def with_after(facts):
    """Return a function that gives the facts with another last stage."""

    def change(spread=0.02, **changes):
        return replace(facts, stages=(facts.before, replace(facts.after, spread=spread, **changes)))

    return change
