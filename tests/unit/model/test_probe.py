"""Probe: how a host calls a model is recorded once, and can be repeated."""

import copy

import pytest
import torch
from torch import nn

from lr_callback.decisions.costs import Call
from lr_callback.model.probe import Probe


class Host(nn.Module):
    """A training module: two parts with parameters, a loss without, and a body in a body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 2)
        self.loss = nn.MSELoss()

    def step(self, inputs):
        return self.loss(self.head(input=self.body(inputs)), torch.zeros(len(inputs), 2))


def recorded(host, batch=3):
    probe = Probe(host)
    probe.start()
    host.step(torch.ones(batch, 4))
    probe.stop()
    return probe


def hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_it_sees_nothing_before_a_call_and_something_after():
    host = Host()
    probe = Probe(host)
    assert not probe.seen
    probe.start()
    assert not probe.seen
    host.step(torch.zeros(3, 4))
    assert probe.seen


def test_the_outermost_calls_are_counted_each_once():
    observation = recorded(Host()).observe()
    assert observation.dense_multiply_adds == 3 * (4 * 6 + 6 * 2)
    assert observation.calls == {"body.0": (Call(3),), "head": (Call(3),)}


def test_a_call_of_the_whole_module_is_one_call():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    probe = Probe(model)
    probe.start()
    model(torch.zeros(5, 4))
    probe.stop()
    assert probe.observe().dense_multiply_adds == 5 * (24 + 12)


def test_two_calls_in_one_step_are_both_counted():
    host = Host()
    probe = Probe(host)
    probe.start()
    host.step(torch.ones(3, 4))
    host.step(torch.ones(2, 4))
    probe.stop()
    assert probe.observe().calls["head"] == (Call(3), Call(2))


def test_after_stop_nothing_more_is_recorded_and_no_hook_is_left():
    host = Host()
    probe = recorded(host)
    assert hooks(host) == 0
    before = probe.observe()
    host.step(torch.ones(7, 4))
    assert probe.observe() == before


def test_repeat_makes_the_same_calls_with_the_same_arguments():
    host, seen = Host(), []
    probe = recorded(host)
    handles = [
        part.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
        )
        for part in (host.body, host.head)
    ]
    probe.repeat()
    assert [one[0] for one in seen] == [host.body, host.head]
    assert torch.equal(seen[0][1][0], torch.ones(3, 4))
    assert list(seen[1][2]) == ["input"]
    for handle in handles:
        handle.remove()


def test_repeat_calls_what_stands_in_the_place_now_and_returns_what_it_gives():
    host = Host()
    probe = recorded(host)
    results = probe.repeat()
    assert len(results) == 2 and results[0].shape == (3, 6) and results[1].shape == (3, 2)
    host.head = nn.Linear(6, 9)
    assert probe.repeat()[1].shape == (3, 9)


def test_after_an_error_in_a_call_the_next_outermost_call_is_still_seen():
    host = Host()
    probe = Probe(host)
    probe.start()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        host.body(torch.ones(3, 5))
    host.head(torch.ones(3, 6))
    probe.stop()
    assert [call.module for call in probe._calls] == [host.body, host.head]


def test_observing_leaves_statistics_and_modes_alone():
    host = Host()
    probe = recorded(host)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    probe.observe()
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert host.body[1].training


def test_calls_can_be_repeated_of_a_copy():
    host = Host()
    probe, other = recorded(host), copy.deepcopy(host)
    other.head = nn.Linear(6, 9)
    assert probe.repeat(other)[1].shape == (3, 9)
    assert probe.repeat()[1].shape == (3, 2)


def test_step_that_a_host_runs_through_the_models_call_is_looked_into():
    host = Host()
    forward = host.forward

    def step(inputs):
        host.forward = forward
        return host.step(inputs)

    probe = Probe(host)
    probe.start()
    host.forward = step  # as Lightning does on several processes, for as long as the call takes
    host(torch.ones(3, 4))
    probe.stop()
    assert probe.observe() == recorded(Host()).observe()


def test_a_forward_that_a_host_has_put_back_is_that_of_the_class():
    """Lightning leaves it with the module after a step on several processes."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model.forward = model.forward
    probe = Probe(model)
    probe.start()
    model(torch.zeros(5, 4))
    probe.stop()
    assert [module for module, _ in probe.calls] == [model]
