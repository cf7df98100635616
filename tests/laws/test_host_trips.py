"""On a GPU each question of the host waits for all that is under way: how many there are, counted on the CPU.

Counted is what would wait for another device: a number that is read, a list, a tensor that is brought over, and indices
whose number depends on values. ``torch.linalg`` has questions of its own, whether a decomposition worked.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lr_callback as lrc
from lr_callback.common.parallel import Workers
from lr_callback.mathematics.errors import relative_errors
from lr_callback.mathematics.lanczos import Lanczos
from lr_callback.mathematics.truncation import truncate

OPERATIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
METHODS = ("cpu", "tolist", "numpy")
ALONE = Workers(None)  # what a mode counts is what its own thread does


class Operations(TorchDispatchMode):
    """Count what reads values below Python, and decompositions."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in OPERATIONS or by_mask:
            self.found["trips"] += 1
        self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Count what brings a tensor to the host; on the CPU there is no operation for it."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found["trips"] += getattr(function, "__name__", "") in METHODS
        return function(*args, **(kwargs or {}))


@contextmanager
def counting():
    """Count what the block does, by name; ``trips`` are those that would wait for another device."""
    found = Counter()
    with ExitStack() as modes:
        modes.enter_context(Operations(found))
        modes.enter_context(Methods(found))
        yield found


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    @contextmanager
    def alone():
        yield ALONE

    for module in ("lr_callback.analysis.layerwise", "lr_callback.edits.surgery"):
        monkeypatch.setattr(f"{module}.workers", alone)


@pytest.mark.parametrize(
    ("question", "trips"),
    [
        (lambda values: float(values.sum()), 1),
        (lambda values: bool((values > 0).any()), 1),
        (lambda values: values[values > 0], 1),
        (lambda values: values.nonzero(), 1),
        (lambda values: values.tolist(), 1),
        (lambda values: values.cpu(), 1),
        (lambda values: torch.where(values > 0, values, 0.0)[torch.tensor([0, 1])], 0),
    ],
)
def test_what_would_wait_is_counted(question, trips):
    with counting() as found:
        question(torch.ones(3))
    assert found["trips"] == trips


@pytest.mark.parametrize("error", ["slice", "bound", "frobenius"])
@pytest.mark.parametrize("counts", [[1], [1, 2, 4, 8, 16, 32]], ids=["one slicing", "six"])
@pytest.mark.parametrize("rows", [24, 200])
def test_the_errors_of_a_layer_come_over_once_whatever_its_slicings(rows, counts, error):
    with counting() as found:
        relative_errors(
            torch.randn(rows, 96), error, {k: min(rows, 96 // k) for k in counts}, ALONE, dict.fromkeys(counts, 9)
        )
    assert found["trips"] == 1


def test_errors_weighted_by_mean_squares_come_over_once_too():
    with counting() as found:
        relative_errors(
            torch.randn(50, 96), "frobenius", {1: 40, 4: 10, 8: 5}, ALONE, moments=torch.rand(1, 96).double()
        )
    assert found["trips"] == 1


def test_errors_weighted_by_second_moments_ask_once_more_for_each_tall_slicing():
    inputs = torch.randn(200, 96).double()
    with counting() as found:
        relative_errors(
            torch.randn(50, 96), "frobenius", {1: 40, 4: 10, 8: 5}, ALONE, moments=(inputs.mT @ inputs)[None]
        )
    assert found["trips"] == 1 + 2


def test_the_operator_norms_ask_once_in_four_steps_and_a_few_times_for_each_chunk(monkeypatch):
    steps, begun = Counter(), Counter()
    advance, begin = Lanczos.advance, Lanczos.__init__
    monkeypatch.setattr(Lanczos, "advance", lambda self, images: (steps.update("1"), advance(self, images))[1])
    monkeypatch.setattr(Lanczos, "__init__", lambda self, *given: (begun.update("1"), begin(self, *given))[1])
    with counting() as found:
        relative_errors(torch.randn(128, 512), "operator", {1: 90, 2: 60, 4: 30}, ALONE)
    assert steps.total() > 50
    # Every eighth step looks at what has settled, besides.
    assert found["trips"] <= 1 + steps.total() / 4 + steps.total() / 8 + 4 * begun.total()


@pytest.mark.parametrize(("rank", "trips"), [(1, 1), (2, 0), (40, 0)])
@pytest.mark.parametrize("slices", [1, 12])
def test_a_truncation_asks_at_most_once(slices, rank, trips):
    with counting() as found:
        truncate(torch.randn(slices, 90, 100), rank, ALONE)
    assert found["trips"] == trips


def test_one_rank_of_wide_slices_takes_no_full_decomposition():
    with counting() as found:
        truncate(torch.randn(3, 90, 100), 1, ALONE)
        assert found["aten::linalg_cholesky_ex"] + found["aten::_linalg_eigh"] > 0
    assert found["aten::linalg_cholesky_ex"] == 1


def linears(depth: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(48, 48) for _ in range(depth)])


def trips_of_each_layer(run) -> float:
    """Return how many more trips each more layer makes."""
    trips = {}
    for depth in (3, 7):
        model = linears(depth)
        with counting() as found:
            run(model)
        trips[depth] = found["trips"]
    return (trips[7] - trips[3]) / 4


def test_the_analysis_asks_three_times_of_each_layer():
    # Are the weights finite and not all zero; their norm; the errors.
    assert trips_of_each_layer(lambda model: lrc.analyze(model, lrc.ALDS())) == 3


def test_a_surgery_asks_once_of_each_layer():
    allocations = {depth: lrc.allocate(linears(depth), method=lrc.UniformRank()) for depth in (3, 7)}
    # Are the factors finite.
    assert trips_of_each_layer(lambda model: lrc.factorize_(model, allocations[len(model)])) == 1
