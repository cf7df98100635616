"""Law 5: the optimizer holds exactly the trainable parameters that it should, and nothing else of it changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc

law = settings(max_examples=20, deadline=None)

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "fused": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True),
    "foreach": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "adam_fused": lambda groups: torch.optim.Adam(groups, lr=1e-2, fused=True),
    "adam_foreach": lambda groups: torch.optim.Adam(groups, lr=1e-2, foreach=True, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.9),
    "lbfgs": lambda groups: torch.optim.LBFGS(groups, lr=0.1, max_iter=4),
}
WITH_STATE_OF_EACH = [name for name in OPTIMIZERS if name not in ("sgd", "lbfgs")]


def network():
    """Return a model of five layers with a weight, the last of which is never factorized here."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 8),
    )


def step(model, optimizer):
    """Make one training step."""
    inputs = torch.linspace(-1, 1, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    return float(optimizer.step(closure).detach())


def compress(model, optimizer, keep_ratio=0.5):
    allocation = lrc.allocate(model, keep_ratio, exclude="6")
    return lrc.factorize_(model, allocation, optimizers=optimizer)


def ids(parameters):
    return [id(one) for one in parameters]


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_and_moves_every_factor(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    report = compress(model, optimizer)
    assert len(report.factorized) >= 2
    assert ids(optimizer.param_groups[0]["params"]) == ids(model.parameters())
    new = [factor for of in report.replacements.values() for factor in of]
    before = [factor.detach().clone() for factor in new]
    losses = [step(model, optimizer) for _ in range(12)]
    assert all(not torch.equal(factor, old) for factor, old in zip(new, before, strict=True))
    assert losses[-1] < losses[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)


@pytest.mark.parametrize("name", WITH_STATE_OF_EACH)
def test_the_state_of_untouched_parameters_is_untouched_and_that_of_gone_ones_is_gone(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    before = {key: {k: copied(v) for k, v in state.items()} for key, state in optimizer.state.items()}
    held = {key: dict(state) for key, state in optimizer.state.items()}
    report = compress(model, optimizer)
    assert not any(old in optimizer.state for old in report.replacements)
    kept = [one for one in model.parameters() if one in before]
    assert len(kept) >= 4
    for parameter in kept:
        state = optimizer.state[parameter]
        assert all(state[key] is held[parameter][key] for key in held[parameter])
        assert state.keys() == before[parameter].keys()
        assert all(equal(state[key], value) for key, value in before[parameter].items())


def test_the_first_step_of_new_factors_has_no_momentum_of_others():
    model = network()
    optimizer = OPTIMIZERS["fused"](model.parameters())
    step(model, optimizer)
    report = compress(model, optimizer)
    new = [factor for of in report.replacements.values() for factor in of]
    assert all(not optimizer.state[factor]["momentum_buffer"].any() for factor in new)
    before = [factor.detach().clone() for factor in new]
    step(model, optimizer)
    for factor, old in zip(new, before, strict=True):
        assert torch.allclose(factor, old - 0.05 * factor.grad)


@law
@given(data=st.data(), keep_ratio=st.floats(0.35, 1.0), back=st.booleans())
def test_factors_stand_in_the_group_of_their_weight_at_its_place_and_all_else_stays(data, keep_ratio, back):
    model = network()
    parameters = list(model.parameters())
    of_group = [data.draw(st.integers(0, 2)) for _ in parameters]
    groups = [
        {
            "params": [one for one, own in zip(parameters, of_group, strict=True) if own == index],
            "lr": 0.1 * (index + 1),
        }
        for index in range(3)
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.5)
    objects = [(id(group), id(group["params"])) for group in optimizer.param_groups]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    wanted = [list(group["params"]) for group in optimizer.param_groups]
    report = compress(model, optimizer, keep_ratio)
    heirs = report.replacements
    if back:
        again = lrc.densify_(model, optimizers=optimizer).replacements
        heirs = {old: [new for one in of for new in again[one]] for old, of in heirs.items()}
    expected = [[id(new) for old in group for new in heirs.get(old, [old])] for group in wanted]
    assert [ids(group["params"]) for group in optimizer.param_groups] == expected
    assert sorted(one for group in expected for one in group) == sorted(ids(model.parameters()))
    assert [(id(group), id(group["params"])) for group in optimizer.param_groups] == objects
    assert options == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", ["momentum", "adamw", "fused"])
def test_weights_and_biases_in_groups_of_their_own(name):
    model = network()
    weights = [one for one in model.parameters() if one.dim() > 1]
    biases = [one for one in model.parameters() if one.dim() == 1]
    optimizer = OPTIMIZERS[name]([{"params": weights}, {"params": biases, "lr": 1e-4, "weight_decay": 0.0}])
    step(model, optimizer)
    report = compress(model, optimizer)
    first, second = optimizer.param_groups
    assert ids(first["params"]) == [id(new) for old in weights for new in report.replacements.get(old, [old])]
    assert ids(second["params"]) == ids(biases)
    assert (second["lr"], second["weight_decay"]) == (1e-4, 0.0)
    assert step(model, optimizer) >= 0


def test_two_optimizers_each_get_their_own():
    model = network()
    one = torch.optim.Adam([*model[0].parameters(), *model[2].parameters()])
    other = torch.optim.SGD([*model[4].parameters(), *model[6].parameters()], lr=0.1)
    report = compress(model, [one, other])
    assert {"2", "4"} <= set(report.factorized)
    assert ids(one.param_groups[0]["params"]) == ids([*model[0].parameters(), *model[2].parameters()])
    assert ids(other.param_groups[0]["params"]) == ids([*model[4].parameters(), *model[6].parameters()])


def test_names_in_groups_of_named_parameters_are_those_of_the_model():
    model = network()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": named[:3]}, {"params": named[3:]}], lr=0.1)
    for change in (lambda: compress(model, optimizer), lambda: lrc.densify_(model, optimizers=optimizer)):
        change()
        held = [
            pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        assert [(name, id(one)) for name, one in held] == [(name, id(one)) for name, one in model.named_parameters()]


@pytest.mark.parametrize("held", [True, False])
def test_a_frozen_layer_stays_where_it_was(held):
    model = network()
    model[4].requires_grad_(False)
    optimizer = torch.optim.SGD([one for one in model.parameters() if held or one.requires_grad], lr=0.1, momentum=0.9)
    step(model, optimizer)
    report = compress(model, optimizer)
    assert "4" in report.factorized
    assert not any(one.requires_grad for one in model[4].parameters())
    in_optimizer = set(ids(optimizer.param_groups[0]["params"]))
    assert {id(one) in in_optimizer for one in model[4].parameters()} == {held}
    before = [one.clone() for one in model[4].parameters()]
    step(model, optimizer)
    assert all(torch.equal(one, old) for one, old in zip(model[4].parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_scheduler_keeps_working_on_the_same_groups(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = optimizer.param_groups[0]["lr"]
    step(model, optimizer)
    scheduler.step()
    compress(model, optimizer)
    step(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before / 4)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
