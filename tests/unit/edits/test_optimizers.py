"""Optimizers: parameters are replaced in place, undone, and bound again by name."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lr_callback.edits.optimizers import names_of, rebind, replace_parameters


def parameter(*shape):
    return nn.Parameter(torch.ones(*shape))


def stepped(optimizer):
    """Make one step, so that there is state."""
    for group in optimizer.param_groups:
        for one in group["params"]:
            one.grad = torch.ones_like(one)
    optimizer.step()
    return optimizer


def ids(optimizer):
    return [[id(one) for one in group["params"]] for group in optimizer.param_groups]


def test_one_parameter_gives_way_to_two_at_its_place():
    first, old, last, left, right = (parameter(2) for _ in range(5))
    optimizer = stepped(torch.optim.SGD([first, old, last], lr=0.1, momentum=0.9))
    replace_parameters([optimizer], {old: (left, right)}, {left: "left", right: "right"})
    assert ids(optimizer) == [[id(one) for one in (first, left, right, last)]]
    assert set(optimizer.state) == {first, last}


def test_two_parameters_give_way_to_one():
    left, right, new = parameter(2), parameter(2), parameter(3)
    optimizer = stepped(torch.optim.Adam([left, right]))
    replace_parameters([optimizer], {left: (new,), right: ()}, {new: "new"})
    assert ids(optimizer) == [[id(new)]]
    assert not optimizer.state


def test_an_optimizer_without_the_old_parameters_is_left_alone():
    mine, old, new = parameter(2), parameter(2), parameter(3)
    optimizer = torch.optim.LBFGS([mine])
    optimizer.step(lambda: mine.square().sum())
    state = dict(optimizer.state[mine])
    replace_parameters([optimizer], {old: (new,)}, {new: "new"})
    assert ids(optimizer) == [[id(mine)]]
    assert optimizer.state[mine] == state
    assert state


def test_the_history_of_lbfgs_starts_anew_because_its_length_has_changed():
    old, left, right = parameter(6), parameter(4), parameter(4)
    optimizer = torch.optim.LBFGS([old], max_iter=3)
    optimizer.step(lambda: _loss(optimizer, [old]))
    replace_parameters([optimizer], {old: (left, right)}, {left: "left", right: "right"})
    assert not optimizer.state
    for _ in range(3):
        optimizer.step(lambda: _loss(optimizer, [left, right]))
    assert float(left.detach().abs().max()) < 1e-3


def _loss(optimizer, parameters):
    optimizer.zero_grad()
    loss = sum(one.square().sum() for one in parameters)
    loss.backward()
    return loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("fused", [True, False])
def test_only_a_fused_sgd_with_momentum_gets_zeros_for_the_new_ones(momentum, fused):
    stays, old, new = parameter(2), parameter(2), parameter(3)
    optimizer = stepped(torch.optim.SGD([stays, old], lr=0.1, momentum=momentum, fused=fused))
    replace_parameters([optimizer], {old: (new,)}, {new: "new"})
    assert (new in optimizer.state) == (fused and momentum > 0)
    stepped(optimizer)
    assert torch.allclose(new, torch.full((3,), 0.9))


@pytest.mark.parametrize("fused", [True, False])
def test_adagrad_gets_what_its_constructor_gives(fused):
    stays, old, new = parameter(2), parameter(2), parameter(3)
    optimizer = stepped(torch.optim.Adagrad([stays, old], lr=0.1, initial_accumulator_value=0.5, fused=fused))
    replace_parameters([optimizer], {old: (new,)}, {new: "new"})
    assert optimizer.state[new].keys() == optimizer.state[stays].keys()
    assert torch.equal(optimizer.state[new]["sum"], torch.full((3,), 0.5))
    assert optimizer.state[new]["step"] == 0


def test_names_follow_also_of_a_bias_that_stays():
    weight, bias, left, right = parameter(2), parameter(2), parameter(1), parameter(1)
    optimizer = torch.optim.SGD([("0.weight", weight), ("0.bias", bias)], lr=0.1)
    names = {left: "0.encoder.weight", right: "0.decoder.weight", bias: "0.decoder.bias"}
    undo = ExitStack()
    replace_parameters([optimizer], {weight: (left, right)}, names, undo=undo)
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["0.encoder.weight", "0.decoder.weight", "0.decoder.bias"]
    undo.close()
    assert group["param_names"] == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, torch.optim.LBFGS, lambda all_of: torch.optim.SGD(all_of, 0.1, 0.9)]
)
def test_undo_puts_back_groups_and_state(make):
    stays, old, new = parameter(2), parameter(2), parameter(3)
    optimizer = make([stays, old])
    optimizer.step(lambda: _loss(optimizer, [stays, old]))
    before, state = ids(optimizer), {key: dict(value) for key, value in optimizer.state.items()}
    undo = ExitStack()
    replace_parameters([optimizer], {old: (new,)}, {new: "new"}, undo=undo)
    assert ids(optimizer) != before
    undo.close()
    assert ids(optimizer) == before
    assert {key: dict(value) for key, value in optimizer.state.items()} == state
    optimizer.step(lambda: _loss(optimizer, [stays, old]))


def test_if_the_second_optimizer_fails_the_first_is_as_it_was():
    old, new = parameter(2), parameter(3)
    first = stepped(torch.optim.Adam([old]))
    second = torch.optim.Adam([("old", old)])
    before = ids(first)
    with pytest.raises(KeyError):
        replace_parameters([first, second], {old: (new,)}, names={})
    assert ids(first) == ids(second) == before
    assert set(first.state) == {old}
    assert second.param_groups[0]["param_names"] == ["old"]


def test_names_of_gives_one_name_for_each_parameter_and_none_for_a_stranger():
    model, stranger = nn.Linear(2, 2), parameter(1)
    one = torch.optim.SGD([{"params": [model.bias]}, {"params": [model.weight, stranger]}], lr=0.1)
    other = torch.optim.SGD([model.weight], lr=0.1)
    assert names_of([one, other], dict(model.named_parameters())) == [[["bias"], ["weight", None]], [["weight"]]]


def test_rebind_puts_the_named_parameters_in_this_order():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(old.named_parameters(), lr=0.1)
    rebind([optimizer], [[["bias", "weight"]]], dict(new.named_parameters()))
    assert ids(optimizer) == [[id(new.bias), id(new.weight)]]
    assert optimizer.param_groups[0]["param_names"] == ["bias", "weight"]


def test_rebind_makes_groups_of_one_parameter_each_those_of_the_file():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = dict(model.named_parameters())
    groups = [{"params": [one], "lr": 0.1 * index} for index, one in enumerate(named.values(), start=1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    rebind([optimizer], [[["1.weight", "0.weight"], ["1.bias"], ["0.bias"]]], named)
    assert ids(optimizer) == [
        [id(named["1.weight"]), id(named["0.weight"])],
        [id(named["1.bias"])],
        [id(named["0.bias"])],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.4, 0.2])


@pytest.mark.parametrize(
    "names",
    [
        [],
        [[]],
        [[["weight"], ["gone"]]],
        [[["weight"], [None]]],
        [[["weight"], ["bias"]]],
        [[["weight", None]]],
        [[["weight", "gone"]]],
    ],
    ids=str,
)
def test_rebind_leaves_alone_what_does_not_match(names):
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    before = ids(optimizer)
    rebind([optimizer], names, dict(new.named_parameters()))
    assert ids(optimizer) == before
