"""The authors' code against ours: the same sizes, the same errors for the same choices, never a worse optimum.

The figures are those of ``../shared/reference/torchprune.json``; without that folder the tests are skipped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import lr_callback as lrc
from lr_callback.common.parallel import workers
from lr_callback.mathematics.errors import relative_errors
from lr_callback.mathematics.folding import fold
from lr_callback.recipes import CifarResNet

RUNS = [(name, ratio) for name in ("resnet18", "resnet50") for ratio in (0.1, 0.2, 0.3, 0.5)]
TRAINED_RUNS = [("cifar10_resnet20", ratio) for ratio in (0.7, 0.5, 0.4, 0.3, 0.2)]

Record = dict[str, Any]
Choice = tuple[str, int, int, dict[str, float]]  # layer, slices, rank, recorded errors


@pytest.fixture(scope="session")
def records(shared: Path) -> dict[tuple[str, float], Record]:
    listed = json.loads((shared / "reference" / "torchprune.json").read_text(encoding="utf-8"))
    return {(record["network"], record["keep_ratio_asked"]): record for record in listed}


@pytest.fixture(scope="session")
def networks(shared: Path) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"cifar10_resnet20": CifarResNet(20, weights=shared / "data" / "cifar10_resnet20.pt")}
    for name in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        found[name] = getattr(torchvision.models, name)(weights=None)
    return found


@pytest.fixture(scope="session")
def analyses(networks: dict[str, nn.Module]) -> dict[str, lrc.Analysis]:
    return {name: lrc.analyze(network, lrc.ALDS(error="slice")) for name, network in networks.items()}


def weight_of(network: nn.Module, layer: str) -> torch.Tensor:
    return network.get_submodule(layer).weight.detach()


def factorized(record: Record) -> list[Choice]:
    layers = {name: one for name, one in record["layers"].items() if one is not None}
    return [(name, one["num_slices"], one["rank"], one) for name, one in layers.items()]


def slice_error_by_svd(weight: torch.Tensor, num_slices: int, rank: int) -> float:
    double = weight.double()
    values = [torch.linalg.svdvals(part.flatten(1)) for part in double.chunk(num_slices, dim=1)]
    left_over = max(value[rank].item() if rank < len(value) else 0.0 for value in values)
    return left_over / torch.linalg.matrix_norm(double.flatten(1), 2).item()


@pytest.fixture
def case(request, records, networks, analyses) -> tuple[Record, nn.Module, lrc.Analysis]:
    """Return a record with its network, or skip it where torch draws other weights than those it was made from."""
    name, keep_ratio = request.param
    record = records[name, keep_ratio]
    layer, num_slices, rank, recorded = factorized(record)[0]
    found = slice_error_by_svd(weight_of(networks[name], layer), num_slices, rank)
    if abs(found - recorded["relative_error_slice"]) > 1e-5:
        pytest.skip(f"torch {torch.__version__} draws other weights for {name} than torch {record.get('torch')}")
    return record, networks[name], analyses[name]


every_run = pytest.mark.parametrize("case", RUNS + TRAINED_RUNS, indirect=True, ids=str)
trained_runs = pytest.mark.parametrize("case", TRAINED_RUNS, indirect=True, ids=str)


def test_every_record_is_compared(records):
    assert set(records) == {*RUNS, *TRAINED_RUNS}


@every_run
def test_at_the_recorded_size_the_worst_error_is_at_most_the_recorded_one(case):
    record, _, analysis = case
    assert analysis.dense_cost == record["parameters_dense"]
    allocation = analysis.allocate(record["parameters"] / record["parameters_dense"])
    assert allocation.budget == record["parameters"]
    assert allocation.cost <= record["parameters"]
    assert allocation.worst_error <= record["worst_error_slice"] + 1e-9


@every_run
def test_the_recorded_choices_cost_the_recorded_number_of_parameters(case):
    record, _, analysis = case
    cost = analysis.dense_cost
    for layer, num_slices, rank, _ in factorized(record):
        (candidate,) = (one for one in analysis.layers[layer].candidates if one.num_slices == num_slices)
        cost += candidate.cost(rank) - analysis.layers[layer].dense_cost
    assert cost == record["parameters"]


@every_run
def test_the_recorded_choices_have_the_recorded_slice_errors(case):
    record, _, analysis = case
    for layer, num_slices, rank, recorded in factorized(record):
        (candidate,) = (one for one in analysis.layers[layer].candidates if one.num_slices == num_slices)
        assert candidate.errors[rank].item() == pytest.approx(recorded["relative_error_slice"], abs=1e-6), layer


@trained_runs
def test_the_recorded_choices_have_the_recorded_operator_errors(case):
    record, network, _ = case
    with workers() as crew:
        for layer, num_slices, rank, recorded in factorized(record):
            matrix = fold(weight_of(network, layer), "kernel_in_encoder", 1)[0]
            curve = relative_errors(matrix, "operator", {num_slices: rank}, crew)[num_slices]
            assert curve[rank].item() == pytest.approx(recorded["relative_error_operator_true"], rel=1e-4), layer


@trained_runs
def test_in_the_operator_norm_the_exact_optimum_is_clearly_better_than_the_recorded_choice(case):
    record, network, _ = case
    keep_ratio = record["parameters"] / record["parameters_dense"]
    allocation = lrc.allocate(network, keep_ratio, method=lrc.ALDS(error="operator"))
    assert allocation.cost <= record["parameters"]
    assert allocation.worst_error <= 0.95 * record["worst_operator_error_true"]


@pytest.mark.parametrize("case", [("resnet18", 0.1)], indirect=True, ids=str)
def test_resnet18_at_a_tenth_has_the_optimum_that_an_independent_search_found(case):
    record, _, analysis = case
    allocation = analysis.allocate(record["parameters"] / record["parameters_dense"])
    assert allocation.worst_error == pytest.approx(0.360, abs=1e-3)
