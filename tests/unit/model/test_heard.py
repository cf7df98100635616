"""The outermost calls are heard with copies of what they were given, and copies of a module hear nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lr_callback.model.heard import Heard


class Writes(nn.Module):
    """Writes to its inputs, and calls a part of itself."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 3)

    def forward(self, inputs, scale=1.0):
        return self.part(inputs.mul_(scale))


@pytest.fixture
def heard():
    return Heard()


def test_inputs_are_those_from_before_the_call(heard):
    model = Writes()
    heard.attach(model.modules())
    inputs = torch.ones(2, 4)
    with heard.listening():
        output = model(inputs, scale=0.5)
    (call,) = heard.invocations
    assert call.module is model and call.named == {"scale": 0.5}
    assert torch.equal(call.arguments[0], torch.ones(2, 4)) and torch.equal(inputs, torch.full((2, 4), 0.5))
    assert heard.outputs == [output]
    assert torch.equal(call.repeat(model), output)


def test_nothing_is_heard_outside_and_what_was_heard_is_gone_the_next_time(heard):
    model = Writes()
    heard.attach([model.part])
    for _ in range(2):
        with heard.listening():
            model(torch.ones(2, 4))
        model(torch.ones(2, 4))
        assert [one.module for one in heard.invocations] == [model.part]
    heard.detach()
    with heard.listening():
        model(torch.ones(2, 4))
    assert heard.invocations == [] and not model.part._forward_hooks


def test_a_call_that_fails_does_not_hide_the_next(heard):
    model = Writes()
    heard.attach(model.modules())
    with heard.listening():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(2, 5))
        model(torch.ones(2, 4))
    assert len(heard.invocations) == 2


def test_autocast_is_repeated(heard):
    model = nn.Linear(4, 3)
    heard.attach([model])
    with heard.listening(), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.ones(2, 4))
    assert heard.invocations[0].repeat(model).dtype == output.dtype == torch.bfloat16


def test_the_dtype_of_new_tensors_is_repeated(heard):
    class Makes(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), torch.zeros(1)

    model = Makes(4, 3)
    heard.attach([model])
    torch.set_default_dtype(torch.float64)
    try:
        with heard.listening():
            model(torch.ones(2, 4, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert heard.invocations[0].repeat(model)[1].dtype == torch.float64
    assert torch.zeros(1).dtype == torch.float32


def test_a_call_that_writes_to_its_arguments_can_be_repeated_again(heard):
    model = Writes()
    heard.attach([model])
    with heard.listening():
        wanted = model(torch.ones(2, 4), scale=3.0)
    [call] = heard.invocations
    assert all(torch.equal(call.repeat(model, again=True), wanted) for _ in range(3))


def test_copies_and_files_of_a_module_hear_nothing(heard):
    model = Writes()
    heard.attach(model.modules())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with heard.listening():
            other(torch.ones(2, 4))
        assert heard.invocations == []
