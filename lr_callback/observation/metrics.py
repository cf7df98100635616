"""What a run logs of a compression, as torchmetrics.

Their values are those of one model, the same on every process of a distributed run: all are fractions or means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric

from lr_callback.decisions.allocation import Allocation
from lr_callback.metrics import KeptCost, StableRank


def compression_metrics(
    allocation: Allocation,
    parameters: tuple[int, int],
    multiply_adds: tuple[int, int] | None,
    seconds: float,
    measured: Mapping[str, float] | None = None,
) -> MetricCollection:
    """Return the metrics of one compression, filled.

    Args:
        allocation: what was carried out.
        parameters: of the model as it is and of the dense one.
        multiply_adds: likewise; None while they are not known.
        seconds: that analysis and surgery took.
        measured: name -> value of what else is known.

    Example::

        >>> allocation = Allocation({}, {}, {}, cost=5, dense_cost=10, budget=5, keep_ratio=0.5)
        >>> values = compression_metrics(allocation, (5, 10), None, seconds=1.5).compute()
        >>> values["compression/kept_parameters"], values["compression/seconds"]
        (tensor(0.5000), tensor(1.5000))
    """
    numbers = {
        "worst_error": allocation.worst_error,
        "mean_error": allocation.mean_error,
        "layers_factorized": float(len(allocation.factorized)),
        "seconds": seconds,
        **(measured or {}),
    }
    metrics: dict[str, Metric] = {name: _mean_of(value) for name, value in numbers.items()}
    metrics["kept_parameters"] = _kept(parameters)
    if multiply_adds is not None:
        metrics["kept_multiply_adds"] = _kept(multiply_adds)
    # The states of these metrics differ in meaning where they agree in value, and must not be shared.
    return MetricCollection({f"compression/{name}": one for name, one in metrics.items()}, compute_groups=False)


def stable_rank_metric(ranks: Iterable[float]) -> Metric:
    """Return the mean of the stable ranks of layers, filled.

    Example::

        >>> stable_rank_metric([2.0, 4.0]).compute()
        tensor(3.)
    """
    metric = StableRank()
    for rank in list(ranks) or [0.0]:
        metric.update(rank)
    return metric


def _mean_of(value: float) -> Metric:
    metric = MeanMetric()
    metric.update(value)
    return metric


def _kept(costs: tuple[int, int]) -> Metric:
    metric = KeptCost()
    metric.update(*costs)
    return metric
