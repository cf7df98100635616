"""The metrics of a compression: values of one model, however they are merged, reset or moved."""

import pytest
import torch

from lr_callback import Allocation, Factorization
from lr_callback.observation.metrics import KeptCost, compression_metrics


def allocation(*errors, dense=1):
    layers = {f"layer{i}": Factorization("kernel_in_encoder", 1, 2, error, 10, 40) for i, error in enumerate(errors)}
    layers |= {f"dense{i}": None for i in range(dense)}
    return Allocation(layers, {}, {}, cost=30, dense_cost=100, budget=30, keep_ratio=0.3)


@pytest.mark.parametrize(
    ("kept", "dense"), [(30, 120), (0, 7), (7, 7), (80_902, 269_722), (5_190_533_121, 9_000_000_007)]
)
def test_kept_cost_is_kept_over_dense(kept, dense):
    metric = KeptCost()
    metric.update(kept, dense)
    assert float(metric.compute()) == pytest.approx(kept / dense, rel=1e-6)


def test_kept_cost_is_that_of_the_latest_update():
    metric = KeptCost()
    metric.update(100, 100)
    metric.update(25, 100)
    assert float(metric.compute()) == 0.25
    assert float(metric(40, 50)) == pytest.approx(0.8)


@pytest.mark.parametrize(("kept", "dense"), [(1, 0), (1, -5), (-1, 5)])
def test_costs_out_of_range_are_refused(kept, dense):
    with pytest.raises(ValueError, match=rf"`dense` must be above 0 and `kept` at least 0, got {dense} and {kept}"):
        KeptCost().update(kept, dense)


def test_states_of_equal_processes_are_averaged_not_summed():
    one, other = KeptCost(), KeptCost()
    for metric in (one, other):
        metric.update(30, 120)
    one.merge_state(other)
    assert (float(one.kept), float(one.dense)) == (30.0, 120.0)
    assert set(one._reductions) == {"kept", "dense"}
    for state, reduction in one._reductions.items():
        gathered = torch.stack([getattr(one, state)] * 4)
        assert torch.equal(reduction(gathered), getattr(one, state))


def test_reset_forgets_the_costs():
    metric = KeptCost()
    metric.update(30, 120)
    metric.reset()
    assert (float(metric.kept), float(metric.dense)) == (0.0, 0.0)


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
