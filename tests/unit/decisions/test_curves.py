"""Curves: what is sampled of an analysis, and the written form there and back."""

import copy
import io
import json

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.decisions.curves import VERSION, Curves
from lr_callback.decisions.sampling import MOST_LAYERS, MOST_RANKS
from lr_callback.model.pricing import Prices


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 300), nn.Linear(300, 200))


def curves_of(model: nn.Module, ratio: float = 0.4, **options: object) -> tuple[lrc.Allocation, Curves]:
    analysis = lrc.analyze(model, **options)
    allocation = analysis.allocate(ratio)
    return allocation, analysis.curves(allocation)


def exact(model: nn.Module, name: str, layer) -> torch.Tensor:
    """Return the singular values ``(slices, n)`` of a Linear layer's slices, by an SVD."""
    weight = model.get_submodule(name).weight.detach().double()
    return torch.stack([torch.linalg.svdvals(part) for part in weight.chunk(layer.num_slices, dim=1)])


@pytest.mark.parametrize("error", ["slice", "bound", "operator", "frobenius"])
@pytest.mark.parametrize("slices", [1, 4])
def test_values_are_those_of_a_singular_value_decomposition(model, error, slices):
    _, curves = curves_of(model, method=lrc.ALDS(error, slices=[slices]))
    for name in ("3", "4"):
        layer = curves.layers[name]
        values = exact(model, name, layer)
        expected = values.square().sum(0).sqrt() if error == "frobenius" else values.amax(0)
        if error == "operator" and slices > 1:
            assert set(layer.values) == {None}
        else:
            found = torch.tensor(layer.values, dtype=torch.float64)
            wanted = (expected / expected[0])[torch.tensor(layer.ranks) - 1]
            assert torch.allclose(found, wanted, rtol=1e-5)


def test_errors_are_those_of_the_analysis_and_the_cut_is_among_them(model):
    allocation, curves = curves_of(model)
    assert list(curves.layers) == ["0", "3", "4"]
    for name, layer in curves.layers.items():
        chosen = allocation.layers[name]
        assert (layer.rank, layer.num_slices, layer.folding) == (chosen.rank, chosen.num_slices, chosen.folding)
        assert layer.errors[layer.ranks.index(chosen.rank)] == chosen.relative_error
        assert 1 < len(layer.ranks) <= MOST_RANKS and layer.ranks[0] == 1
        assert list(layer.errors) == sorted(layer.errors, reverse=True)


def test_weighted_values_are_those_of_the_weighted_layer(model):
    linear = nn.Sequential(nn.Linear(24, 40, bias=False))
    batches = [torch.randn(200, 24) @ torch.randn(24, 24)]
    importance = lrc.collect_moments(linear, batches)
    _, curves = curves_of(linear, method=lrc.ALDS("activation", slices=[1]), importance=importance)
    layer = curves.layers["0"]
    values = torch.linalg.svdvals(batches[0].double() @ linear[0].weight.detach().double().T)
    assert torch.allclose(
        torch.tensor(layer.values, dtype=torch.float64), (values / values[0])[torch.tensor(layer.ranks) - 1], rtol=1e-4
    )
    assert curves.spectrum.endswith("weighted as in activation")


METHODS = [
    lrc.ALDS(),
    lrc.ALDS("frobenius", "sum", power=4),
    lrc.ALDS("operator"),
    lrc.ALDSK(),
    lrc.EnergyThreshold(),
    lrc.LRank(),
    lrc.UniformRank(),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_tradeoff_is_close_to_what_the_method_chooses(model, method):
    analysis = lrc.analyze(model, method=method)
    curves = analysis.curves(analysis.allocate(0.5))
    costs = [one.cost for one in curves.tradeoff]
    assert costs == sorted(set(costs)) and analysis.smallest_cost <= costs[0] and costs[-1] <= curves.dense_cost
    assert len(costs) > 10
    for one in curves.tradeoff:
        exactly = analysis.allocate(one.cost / curves.dense_cost)
        assert one.cost <= exactly.budget
        assert one.mean_error == pytest.approx(exactly.mean_error, abs=0.05)
    assert curves.chosen.worst_error == analysis.allocate(0.5).worst_error


def test_a_method_without_a_sketch_leaves_the_chosen_point(model):
    class Own(lrc.Method):
        def choose(self, layers, budget):
            return dict.fromkeys(layers)

        def smallest_cost(self, layers):
            return sum(layer.dense_cost for layer in layers.values())

    analysis = lrc.analyze(model, method=Own("slice"))
    curves = analysis.curves(analysis.allocate(1.0))
    assert curves.tradeoff == () and curves.chosen.cost == curves.dense_cost
    assert {layer.rank for layer in curves.layers.values()} == {None}


def test_budgets_in_several_units_are_told_in_the_first(model):
    analysis = lrc.analyze(model, prices=[Prices("parameters"), Prices("bytes")])
    curves = analysis.curves(analysis.allocate({"parameters": 0.5, "bytes": 0.45}))
    assert curves.unit == "parameters" and curves.tradeoff[-1].cost == analysis.dense_cost


def test_overrides_count_in_the_tradeoff(model):
    analysis = lrc.analyze(model, overrides={"3": {"rank": 2}})
    curves = analysis.curves(analysis.allocate(0.5))
    pinned = curves.layers["3"]
    assert pinned.rank == 2
    assert min(one.worst_error for one in curves.tradeoff) == pinned.errors[pinned.ranks.index(2)]


def test_of_many_layers_the_largest_have_curves():
    model = nn.Sequential(*[nn.Linear(8 + index % 3, 16) for index in range(MOST_LAYERS + 30)])
    _, curves = curves_of(model, 0.7, method=lrc.ALDS(slices=[1]))
    assert len(curves.layers) == MOST_LAYERS and curves.left_out == 30
    assert list(curves.layers) == sorted(curves.layers, key=int)
    assert min(layer.dense_cost for layer in curves.layers.values()) >= 8 * 16


def test_allocation_of_another_model_is_refused(model):
    allocation = lrc.allocate(nn.Sequential(nn.Linear(64, 64)), 0.5)
    with pytest.raises(ValueError, match=r"`allocation` must be made of this analysis, by `analysis.allocate\(goal\)`"):
        lrc.analyze(model).curves(allocation)


def test_written_there_and_back_without_loss(model):
    _, curves = curves_of(model, method=lrc.ALDS("operator"))
    buffer = io.BytesIO()
    torch.save(curves.to_dict(), buffer)
    buffer.seek(0)
    assert Curves.from_dict(torch.load(buffer, weights_only=True)) == curves
    assert Curves.from_dict(json.loads(json.dumps(curves.to_dict()))) == curves
    assert buffer.getbuffer().nbytes < 30_000


DAMAGED = [
    (("version",), "1", "must be a dict that `Curves.to_dict"),
    (("version",), VERSION + 1, "version 2 is newer than 1.* update lr_callback"),
    (("unit",), "byte", "`unit` must be one of"),
    (("dense_cost",), 0, "`dense_cost` must be above 0"),
    (("left_out",), -1, "`left_out` must be at least 0"),
    (("tradeoff",), [3], "a point must be a dict"),
    (("chosen", "cost"), -3, "the cost of a point must be at least 0"),
    (("chosen", "worst_error"), float("nan"), "errors of a point must be finite"),
    (("layers", "3"), 3, "must be a name with a dict"),
    (("layers", "3", "folding"), "no", "`folding` must be one of"),
    (("layers", "3", "full_rank"), 0, "counts must be from 1"),
    (("layers", "3", "ranks", 0), 50, "`ranks` must ascend"),
    (("layers", "3", "rank"), 10_000, "`rank` must be None or one of `ranks`"),
    (("layers", "3", "dense_cost"), -1, "`dense_cost` must be at least 0"),
    (("layers", "3", "errors", 1), float("inf"), "`errors` must be finite numbers from 0"),
    (("layers", "3", "values", 1), 1.5, "`values` must be from 0 to 1"),
    (("layers", "3", "values"), [1.0], "must be of one length"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGED, ids=[".".join(map(str, row[0])) for row in DAMAGED])
def test_damaged_curves_are_refused(model, path, value, message):
    written = copy.deepcopy(curves_of(model)[1].to_dict())
    inner = written
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=f"^Curves.*{message}"):
        Curves.from_dict(written)


def test_what_is_no_dict_is_refused():
    with pytest.raises(ValueError, match="Curves: must be a dict"):
        Curves.from_dict([1])
