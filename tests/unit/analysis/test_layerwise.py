"""Layer by layer: every layer once, small ones side by side, the same candidates either way."""

import time

import pytest
import torch
from torch import nn

from lr_callback.analysis import layerwise
from lr_callback.analysis.layerwise import candidates_of
from lr_callback.decisions.costs import LayerCost
from lr_callback.decisions.methods import ALDS
from lr_callback.model.find import find_layers
from lr_callback.model.pricing import Prices, first_costs, layer_costs


def network() -> tuple[dict[str, nn.Module], dict[str, LayerCost]]:
    torch.manual_seed(0)
    found = find_layers(nn.Sequential(nn.Linear(600, 500), nn.Linear(40, 30), nn.Conv2d(8, 12, 3), nn.Linear(30, 20)))
    return found.layers, first_costs(layer_costs(found, [Prices()]))


@pytest.mark.parametrize("error", ["slice", "operator"])
def test_small_layers_have_the_candidates_that_each_has_alone(error, monkeypatch):
    layers, costs = network()
    together = candidates_of(layers, costs, dict.fromkeys(layers, ALDS(error=error)), None)
    monkeypatch.setattr(layerwise, "_SMALL", 0)
    apart = [
        candidates_of({name: layer}, costs, {name: ALDS(error=error)}, None)[name] for name, layer in layers.items()
    ]
    assert list(together) == list(layers)
    for one, other in zip(together.values(), apart, strict=True):
        assert [each.num_slices for each in one.candidates] == [each.num_slices for each in other.candidates]
        assert all(
            torch.equal(mine.errors, its.errors) for mine, its in zip(one.candidates, other.candidates, strict=True)
        )


def test_progress_is_told_of_every_layer_once_with_the_number_done():
    layers, costs = network()
    told: list[tuple[int, int, str]] = []
    candidates_of(layers, costs, dict.fromkeys(layers, ALDS()), lambda *of: told.append(of))
    assert [(done, count) for done, count, _ in told] == [(number, 4) for number in range(4)]
    assert sorted(name for *_, name in told) == sorted(layers)


def test_no_layer_has_no_candidates():
    assert candidates_of({}, {}, {}, None) == {}


def test_a_failure_in_a_small_layer_comes_out_and_the_others_are_not_waited_for():
    seen: list[torch.Tensor] = []

    class Failing(ALDS):
        def candidates(self, weight, cost, workers, importance=None, others=None):
            seen.append(weight)
            time.sleep(0.002)
            raise ValueError("this layer cannot be had")

    layers = {str(number): nn.Linear(4, 4) for number in range(500)}
    costs = first_costs(layer_costs(find_layers(nn.ModuleDict(layers)), [Prices()]))
    with pytest.raises(ValueError, match="this layer cannot be had"):
        candidates_of(layers, costs, dict.fromkeys(layers, Failing()), None)
    assert 1 <= len(seen) < 500
