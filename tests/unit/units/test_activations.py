"""What is kept for the backward pass: counted on a run in training, told of in budgets."""

import json

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze
from lr_callback.model.observe import Observation, observe, observe_run
from lr_callback.model.pricing import Prices
from tests.laws.test_activations import kept


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(288, 40),
        nn.GELU(),
        nn.Linear(40, 10),
    )


BUDGET = {"parameters": 0.4, "activation_memory": 1.2}


def memory(model, example):
    return observe(model, example, activations=True).activations.dense


@pytest.mark.parametrize(
    "method", [lrc.ALDS(), lrc.ALDS("frobenius", "sum", foldings=["width_in_decoder"])], ids=["", "w"]
)
@pytest.mark.parametrize("growth", [1.05, 1.1, 1.5])
def test_a_budget_is_kept_and_what_is_told_is_what_is_built(method, growth):
    model, example = network(), torch.randn(4, 3, 8, 8)
    asked = {"activation_memory": growth, "parameters": 0.6}
    allocation = lrc.allocate(model, budget=asked, method=method, example_input=example)
    spent = allocation.others["activation_memory"]
    assert allocation.unit == "parameters" and spent.dense_cost == kept(model, example)
    lrc.factorize_(model, allocation)
    assert spent.dense_cost < spent.cost == kept(model, example) <= spent.budget <= growth * spent.dense_cost
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    assert "bytes of activation memory (1" in allocation.summary().replace("\n", " ")
    assert memory(model, example) == spent.dense_cost


def test_the_run_leaves_the_model_as_it_was_in_any_mode():
    model, example = network(), torch.randn(4, 3, 8, 8)
    before, random = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    model[1].eval()
    frozen = memory(model, example)
    assert [one.training for one in model[:3]] == [True, False, True]
    found = memory(model.eval(), example)
    assert not any(one.training for one in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == kept(model.train(), example) != frozen


def test_what_is_not_a_part_of_the_backward_pass_is_not_counted():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, inputs):
            with torch.no_grad():
                features = self.body(inputs).exp()
            self.head(features).exp()  # of no use afterwards
            return self.head(features)

    found = observe(Frozen(), torch.randn(2, 8), activations=True).activations
    assert found.dense == 2 * (2 * 8 * 4), "features, and the output of tanh"
    assert len(found.calls["body"]) == 0 and len(found.calls["head.0"]) == 2


def test_under_autocast_copies_of_weights_count():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Conv1d(8, 16, 3), nn.Tanh(), nn.Linear(62, 62))

        def forward(self, inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(inputs)

    model, example = Cast(), torch.randn(8, 64)
    allocation = lrc.allocate(model, budget={"parameters": 0.5, "activation_memory": 2}, example_input=example)
    spent = allocation.others["activation_memory"]
    assert len(allocation.factorized) >= 2 and spent.dense_cost == kept(model, example)
    lrc.factorize_(model, allocation)
    assert spent.cost == kept(model, example)


def test_it_is_written_and_read():
    seen = observe(network(), torch.randn(4, 3, 8, 8), activations=True)
    written = json.loads(json.dumps(seen.to_dict()))
    assert Observation.from_dict(written) == seen
    del written["activations"]
    assert Observation.from_dict(written).activations is None


@pytest.mark.parametrize(
    "take",
    [
        lambda **goal: lrc.allocate(network(), example_input=torch.randn(4, 3, 8, 8), **goal),
        lrc.LowRankCompression,
    ],
    ids=["function", "callback"],
)
@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (
            {"keep_ratio": 0.5, "cost": "activation_memory"},
            "'activation_memory' cannot be asked for alone: .* in `budget`",
        ),
        ({"max_error": 0.5, "cost": "activation_memory"}, "'activation_memory' cannot be asked for alone"),
        ({"budget": {"activation_memory": 1.2}}, "'activation_memory' cannot be asked for alone"),
        (
            {"budget": {"parameters": 0.5, "activation_memory": 11}},
            r"of activation_memory to keep .* \(0, 10\], got 11",
        ),
        (
            {"budget": {"parameters": 1.5, "activation_memory": 1}},
            r"of parameters to keep must be a number in \(0, 1\]",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused(take, goal, text):
    with pytest.raises(ValueError, match=text):
        take(**goal)


def test_what_cannot_be_met_or_counted_is_refused():
    model, example = network(), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`budget`: 0\.4 of parameters, 1 of activation memory: no allocation keeps"):
        lrc.allocate(model, budget={**BUDGET, "activation_memory": 1.0}, example_input=example)
    with pytest.raises(
        ValueError, match=r"`budget`: .* activation memory that is not in these layers is more than that"
    ):
        lrc.allocate(model, budget={**BUDGET, "activation_memory": 0.9}, example_input=example)
    with pytest.raises(ValueError, match="this one keeps nothing"):
        lrc.allocate(nn.Sequential(nn.Linear(64, 64)), budget=BUDGET, example_input=torch.randn(2, 64))
    seen = observe(model, example)
    with pytest.raises(ValueError, match="this one was not observed in training: do so with `activations=True`"):
        Prices("activation_memory", seen)
    with pytest.raises(ValueError, match="cannot be asked for alone"):
        analyze(model, prices=Prices("activation_memory", observe(model, example, activations=True)))


def test_a_part_of_a_model_that_is_run_alone_has_its_own():
    model, example = network(), torch.randn(2, 288)
    seen = observe_run(model, lambda: model[6:](example), given=[example])
    assert seen.activations.dense == kept(model[6:], example)
