"""Hulls against the definition: at every price, the choice with the smallest value and price together."""

import random

import pytest

from lr_callback.decisions.hull import Curve, steps


def random_curves(seed: int, distinct: bool) -> dict[str, Curve]:
    draw, curves = random.Random(seed), {}
    for name in "abc"[: draw.randint(1, 3)]:
        count = draw.randint(1, 8)
        values = (
            [draw.random() for _ in range(count)] if distinct else [float(draw.randint(0, 6)) for _ in range(count)]
        )
        curves[name] = Curve(sorted(draw.sample(range(1, 30), count)), sorted(values, reverse=True))
    return curves


def best_at(curve: Curve, price: float) -> int:
    charged = [value + price * cost for cost, value in zip(curve.costs, curve.values, strict=True)]
    return charged.index(min(charged))


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_the_steps_down_to_a_price_lead_to_the_best_choice_at_it(seed, distinct):
    curves = random_curves(seed, distinct)
    found = steps(curves)
    assert [step.gain for step in found] == sorted((step.gain for step in found), reverse=True)
    for price in [0.0131, 0.0717, 0.1373, 0.4999, 1.3333, 7.77]:
        at = dict.fromkeys(curves, 0)
        at.update({step.name: step.index for step in found if step.gain > price})
        assert at == {name: best_at(curve, price) for name, curve in curves.items()}


@pytest.mark.parametrize("seed", range(10))
def test_steps_follow_each_other_in_cost_and_value(seed):
    for name, curve in random_curves(seed, distinct=True).items():
        at = 0
        for step in steps({name: curve}):
            assert step.index > at and step.cost == curve.costs[step.index] - curve.costs[at]
            assert step.gain == (curve.values[at] - curve.values[step.index]) / step.cost
            at = step.index


def test_the_order_of_the_layers_does_not_matter():
    curves = random_curves(4, distinct=False)
    assert steps(curves) == steps(dict(reversed(curves.items())))


def test_a_layer_of_one_choice_takes_no_step():
    assert steps({"one": Curve([5], [0.3])}) == [] == steps({})
