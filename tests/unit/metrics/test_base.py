"""All metrics do what torchmetrics asks of a metric, alone, in collections and on two processes."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

import lr_callback as lrc
from lr_callback.metrics import (
    EffectiveRank,
    KeptCost,
    PredictionAgreement,
    RelativeLayerError,
    SecondMoments,
    StableRank,
)
from lr_callback.metrics.functional import (
    effective_rank,
    kept_cost,
    prediction_agreement,
    relative_layer_error,
    second_moments,
    stable_rank,
)
from tests.unit.common.test_processes import on_ranks


@dataclass
class Case:
    """A metric, the same as a function, and what three updates are given."""

    metric: Metric
    function: Any
    updates: list[tuple[Any, ...]]

    def filled(self, updates=None):
        metric = self.metric.clone()
        for one in self.updates if updates is None else updates:
            metric.update(*one)
        return metric


def cases():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 24, 3, groups=2))
    dense = copy.deepcopy(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    pairs, layers = list(zip(dense, model, strict=True)), [(layer,) for layer in dense]
    scores = [(torch.randn(count, 4), torch.randn(count, 4)) for count in (9, 1, 30)]
    rows = [(torch.randn(2, count, 3),) for count in (5, 1, 40)]
    return {
        "kept cost": Case(KeptCost(), kept_cost, [(30, 120), (5, 10), (7, 7)]),
        "agreement": Case(PredictionAgreement(), prediction_agreement, scores),
        "top 2": Case(PredictionAgreement(top_k=2), lambda *two: prediction_agreement(*two, top_k=2), scores),
        "worst error": Case(RelativeLayerError(), relative_layer_error, pairs),
        "mean error": Case(RelativeLayerError(reduction="mean"), relative_layer_error, pairs),
        "smallest error": Case(RelativeLayerError(reduction="min"), relative_layer_error, pairs),
        "operator error": Case(
            RelativeLayerError("operator"), lambda *two: relative_layer_error(*two, "operator"), pairs
        ),
        "effective rank": Case(EffectiveRank(), effective_rank, layers),
        "stable rank": Case(StableRank(), stable_rank, layers),
        "moments": Case(SecondMoments(3, 2), second_moments, rows),
        "squares": Case(SecondMoments(3, 2, diagonal=True), lambda rows: second_moments(rows, True), rows),
    }


CASES = cases()
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_public_metric_is_here():
    assert {type(case.metric) for case in CASES.values()} == {
        getattr(lrc.metrics, name) for name in lrc.metrics.__all__
    }
    assert "metrics" in lrc.__all__


@every
def test_it_says_what_torchmetrics_asks_for(case):
    metric = case.metric
    assert metric.is_differentiable in (True, False) and metric.higher_is_better in (True, False, None)
    assert metric.full_state_update is False
    lower, upper = metric.plot_lower_bound, metric.plot_upper_bound
    for one in case.updates:
        found = case.function(*one)
        assert found.requires_grad == metric.is_differentiable
        if found.dim() == 0:
            assert lower <= found <= (torch.inf if upper is None else upper)


@every
def test_forward_is_the_function_and_adds_what_update_adds(case):
    metric = case.metric.clone()
    for one in case.updates:
        found = metric(*one)
        assert torch.allclose(found, case.function(*one).to(found).reshape(found.shape), rtol=1e-6)
        assert found.requires_grad == metric.is_differentiable
    assert torch.allclose(metric.compute(), case.filled().compute(), rtol=1e-6)
    assert not metric.compute().requires_grad


@every
def test_parts_are_merged_to_the_whole(case):
    one, other = case.filled(case.updates[:1]), case.filled(case.updates[1:])
    one.merge_state(other)
    assert torch.allclose(one.compute(), case.filled().compute(), rtol=1e-6)


@every
def test_copies_go_on_on_their_own(case):
    metric = case.filled()
    value, states = metric.compute(), copy.deepcopy(metric.metric_state)
    for made in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(made.compute(), value)
        made.update(*case.updates[0])
        made.reset()
        made.update(*case.updates[1])
        assert torch.equal(made.compute(), case.filled(case.updates[1:2]).compute())
    assert all(torch.equal(metric.metric_state[name], state) for name, state in states.items())


@every
def test_a_state_dict_holds_what_it_has_seen_where_that_is_asked_for(case):
    metric = case.filled()
    assert not metric.state_dict()
    metric.persistent(True)
    fresh = case.metric.clone()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    fresh.update(*case.updates[0])
    metric.update(*case.updates[0])
    assert torch.equal(fresh.compute(), metric.compute())


@every
def test_it_is_updated_where_no_gradients_are_kept_and_again_where_they_are(case):
    metric = case.metric.clone()
    with torch.inference_mode():
        metric.reset()
        metric.update(*case.updates[0])
    for one in case.updates[1:]:
        metric.update(*one)
    assert torch.equal(metric.compute(), case.filled().compute())


@every
def test_it_is_plotted(case):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    metric = case.filled()
    figure, axes = metric.plot()
    assert axes.get_ylabel() in (type(metric).__name__, "mean square")
    assert metric.plot(ax=axes)[0] is None
    if metric.compute().dim() == 0:
        _, axes = metric.plot([metric.compute()] * 3)
        assert axes.get_xlabel() == "Step"
    figure.canvas.draw()
    pyplot.close("all")


@every
def test_it_is_not_a_number_before_the_first_update_and_again_after_a_reset(case):
    fresh, used = case.metric.clone(), case.filled()
    used.reset()
    for metric in (fresh, used):
        with pytest.warns(UserWarning, match="``compute`` method of metric .* was called before the ``update`` method"):
            found = metric.compute()
        assert bool(found.isnan().all()) and found.shape == case.filled().compute().shape
    used.update(*case.updates[0])
    assert bool(used.compute().isfinite().all())


def test_metrics_of_a_collection_are_those_alone_though_they_agree_at_first():
    """Settings that give the same at first must not be taken for one metric."""
    weights = [torch.eye(4), torch.diag(torch.tensor([2.0, 1.0])), torch.ones(3, 3)]
    alone = {
        "effective": EffectiveRank(),
        "stable": StableRank(),
        "largest": StableRank(reduction="max"),
        "smallest": EffectiveRank(reduction="min"),
        "other folding": EffectiveRank("kernel_in_decoder"),
    }
    together = MetricCollection({name: metric.clone() for name, metric in alone.items()})
    kernels = [weight.reshape(len(weight), -1, 1) for weight in weights] + [torch.randn(4, 3, 5)]
    for kernel in kernels:
        together.update(kernel)
        for metric in alone.values():
            metric.update(kernel)
    assert together.compute() == {name: metric.compute() for name, metric in alone.items()}
    assert len(set(map(float, together.compute().values()))) == len(alone)


def test_agreements_of_a_collection_do_not_share_what_they_count():
    together = MetricCollection({f"top {k}": PredictionAgreement(top_k=k) for k in (1, 2, 3)})
    target = torch.tensor([[3.0, 2.0, 1.0]])
    for preds in ([[3.0, 2.0, 1.0]], [[2.0, 3.0, 1.0]], [[1.0, 2.0, 3.0]]):
        together.update(preds=torch.tensor(preds), target=target)
    found = {name: round(float(value), 3) for name, value in together.compute().items()}
    assert found == {"top 1": 0.333, "top 2": 0.667, "top 3": 1.0}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_on_two_processes_each_computes_what_one_would_of_all(tmp_path):
    """Give two updates to one process and one to the other; batches have different sizes."""

    def work(processes):
        found = {}
        for name, case in CASES.items():
            metric = case.filled(case.updates[:2] if processes.rank == 0 else case.updates[2:])
            own = metric.compute().tolist()
            metric.update(*case.updates[0])  # what was gathered is given up again: each goes on with its own
            found[name] = own, metric.compute().tolist()
        return found

    ranks = on_ranks(2, tmp_path, work)
    assert ranks[0] == ranks[1]
    for name, case in CASES.items():
        first = torch.tensor(ranks[0][name][0])
        assert torch.allclose(first, case.filled().compute().to(first), rtol=1e-6), name
        more = torch.tensor(ranks[0][name][1])
        again = [*case.updates, case.updates[0], case.updates[0]]
        assert torch.allclose(more, case.filled(again).compute().to(more), rtol=1e-6), name
