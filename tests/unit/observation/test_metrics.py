"""The metrics of a compression: values of one model, however they are merged, reset or moved."""

import pytest

from lr_callback import Allocation, Factorization
from lr_callback.observation.metrics import compression_metrics, stable_rank_metric


def allocation(*errors, dense=1):
    layers = {f"layer{i}": Factorization("kernel_in_encoder", 1, 2, error, 10, 40) for i, error in enumerate(errors)}
    layers |= {f"dense{i}": None for i in range(dense)}
    return Allocation(layers, {}, {}, cost=30, dense_cost=100, budget=30, keep_ratio=0.3)


def test_metrics_of_a_compression():
    metrics = compression_metrics(allocation(0.5, 0.1, dense=2), (30, 100), (200, 1000), 1.5, {"milliseconds": 2.0})
    assert {name: float(value) for name, value in metrics.compute().items()} == {
        "compression/worst_error": 0.5,
        "compression/mean_error": pytest.approx(0.15),
        "compression/layers_factorized": 2.0,
        "compression/seconds": 1.5,
        "compression/milliseconds": 2.0,
        "compression/kept_parameters": pytest.approx(0.3),
        "compression/kept_multiply_adds": pytest.approx(0.2),
    }


def test_unknown_multiply_adds_are_left_out():
    metrics = compression_metrics(allocation(0.5), (30, 100), None, seconds=0.0)
    assert "compression/kept_multiply_adds" not in metrics.compute()
    assert "compression/kept_parameters" in metrics.compute()


def test_allocation_with_all_layers_dense_has_no_errors():
    values = compression_metrics(allocation(dense=3), (100, 100), None, seconds=0.1).compute()
    assert float(values["compression/worst_error"]) == float(values["compression/mean_error"]) == 0.0
    assert float(values["compression/layers_factorized"]) == 0.0
    assert float(values["compression/kept_parameters"]) == 1.0


def test_metrics_that_agree_once_do_not_share_their_state():
    metrics = compression_metrics(allocation(0.5, dense=0), (20, 100), (20, 100), seconds=0.5)
    metrics.compute()
    metrics["compression/kept_parameters"].update(90, 100)
    metrics["compression/seconds"].reset()
    metrics["compression/seconds"].update(7.0)
    values = metrics.compute()
    assert float(values["compression/kept_multiply_adds"]) == pytest.approx(0.2)
    assert float(values["compression/worst_error"]) == float(values["compression/mean_error"]) == 0.5


def test_cloned_metrics_keep_their_values():
    metrics = compression_metrics(allocation(0.25), (1, 4), (1, 8), seconds=2.0)
    assert metrics.clone().compute() == metrics.compute()


def test_stable_ranks_that_are_known_are_averaged():
    metric = stable_rank_metric({"a": 2.0, "b": 5.0}.values())
    assert float(metric.compute()) == 3.5
    assert float(stable_rank_metric([]).compute()) == 0.0
