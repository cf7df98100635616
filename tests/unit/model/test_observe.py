"""Observe: a model is run once, counted, and left as it was."""

import json
import random
from collections.abc import Mapping

import numpy
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lr_callback as lrc
from lr_callback.common.untouched import untouched
from lr_callback.decisions.costs import Call
from lr_callback.model.observe import Observation, observe, observe_run, saved_multiply_adds


class Named(nn.Module):
    """Takes its inputs by name, and calls its layer by name, twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, one, two=None):
        return self.layer(input=one) + self.layer(input=two)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.Dropout(), nn.Flatten(), nn.Linear(256, 10)
    )


def counted(module, *inputs):
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2


def test_multiply_adds_are_half_of_what_torch_counts_and_each_call_is_described():
    observation = observe(network(), torch.zeros(2, 3, 8, 8))
    assert observation.dense_multiply_adds == 2 * (16 * 16 * 27 + 256 * 10)
    assert observation.calls == {"0": (Call(2, (8, 8), (4, 4)),), "4": (Call(2),)}


@pytest.mark.parametrize("keep_ratio", [0.3, 0.6])
def test_the_dense_count_does_not_depend_on_what_is_factorized(keep_ratio):
    model, inputs = network(), torch.zeros(2, 3, 8, 8)
    dense = observe(model, inputs)
    lrc.factorize_(model, lrc.allocate(model, keep_ratio))
    assert observe(model, inputs) == dense
    assert dense.multiply_adds(model) == counted(model.eval(), inputs) < dense.dense_multiply_adds
    assert saved_multiply_adds(model, dense.calls) == dense.dense_multiply_adds - dense.multiply_adds(model)
    assert saved_multiply_adds(model, {}) == 0


def test_a_layer_that_is_not_called_has_no_calls():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    observation = observe_run(model, lambda: model["used"](torch.zeros(3, 4)))
    assert observation == Observation(48, {"used": (Call(3),), "unused": ()})


@pytest.mark.parametrize(
    "example",
    [{"one": torch.zeros(2, 32), "two": torch.zeros(3, 1, 32)}, (torch.zeros(2, 32), torch.zeros(3, 1, 32))],
    ids=["dict", "tuple"],
)
def test_arguments_may_be_positional_or_named_and_layers_called_by_name(example):
    model = Named()
    dense = observe(model, example)
    assert dense == Observation(5 * 32 * 32, {"layer": (Call(2), Call(3))})
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert observe(model, example) == dense
    outputs = model(**example) if isinstance(example, Mapping) else model(*example)
    assert outputs.shape == (3, 2, 32)


def test_without_an_example_it_says_what_is_needed():
    with pytest.raises(ValueError, match="multiply-adds, latency and activation memory are of a run on an example"):
        observe(network(), None)


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = network()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    observe(model, torch.ones(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(one.grad is None for one in model.parameters())


def test_after_an_error_in_the_model_it_is_left_as_it_was_too():
    model = network()
    match = r"`example_input`: \w+ must run on it in eval mode without gradients, and raised RuntimeError: .*channels"
    with pytest.raises(ValueError, match=match):
        observe(model, torch.zeros(2, 4, 8, 8))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_inside_untouched_no_gradients_are_kept_and_nothing_trains():
    model = network()
    enabled = torch.backends.mha.get_fastpath_enabled()
    with untouched(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.zeros(1, 3, 8, 8)).requires_grad
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_inside_untouched_no_random_state_moves():
    def drawn():
        return torch.rand(1).item(), random.random(), numpy.random.rand()

    def seed():
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)

    model = network()
    seed()
    expected = drawn()
    seed()
    with pytest.raises(KeyError), untouched(model):
        drawn()
        raise KeyError
    assert drawn() == expected


def test_the_products_of_a_transformer_are_counted_in_eval_mode_too():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    inputs = torch.zeros(2, 5, 16)
    counts = [observe(model.train(training), inputs).dense_multiply_adds for training in (True, False)]
    assert counts[0] == counts[1] >= 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32)


def test_an_observation_travels_as_json():
    observation = observe(network(), torch.zeros(2, 3, 8, 8))
    assert Observation.from_dict(json.loads(json.dumps(observation.to_dict()))) == observation


class Counting(nn.Module):
    """Writes buffers in eval mode: in place, by assignment, under two names, and a cache that grows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        for name in ("calls", "sum", "table"):
            self.register_buffer(name, torch.zeros(1))
        self.register_buffer("same", self.calls)
        self.rows = 1

    def forward(self, features):
        self.calls += 1
        self.sum = self.sum + features.sum()
        if len(features) > self.rows:
            self.rows, self.table = len(features), torch.zeros(len(features))
        return self.layer(features) + self.table.unsqueeze(1)


@pytest.mark.parametrize(
    "run",
    [
        observe,
        lambda model, inputs: lrc.allocate(model, 0.6, example_input=inputs),
    ],
    ids=["observe", "allocate"],
)
def test_buffers_that_a_forward_writes_are_given_back(run):
    model = Counting()
    held = {name: getattr(model, name) for name in ("calls", "sum", "same")}
    run(model, torch.ones(3, 32))
    assert all(getattr(model, name) is buffer for name, buffer in held.items())
    assert not any(buffer.any() for buffer in held.values())
    assert len(model.table) == model.rows == 3
    model(torch.ones(3, 32))


def test_buffers_are_given_back_after_an_error_too():
    model = Counting()
    with pytest.raises(ValueError, match=r"raised RuntimeError: .*shapes"):
        observe(model, torch.ones(1, 7))
    assert not model.calls.any() and not model.sum.any()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_model_without_values_is_not_run():
    lazy, nowhere = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"1\.weight: must be initialised before .*; run one batch first\. Nothing"):
        observe(lazy, torch.ones(1, 4))
    assert isinstance(lazy[1], nn.LazyLinear)
    with pytest.raises(ValueError, match=r"0\.weight: must be on a device where the model can be run .*to_empty"):
        observe(nowhere, torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:FutureWarning")
def test_buffers_inside_of_torchscript_are_given_back():
    scripted = torch.jit.script(nn.BatchNorm1d(32))
    scripted.eval()
    model = nn.Sequential(nn.Linear(32, 32), scripted)
    with untouched(model):
        scripted.train()
        model(torch.randn(4, 32))
    assert scripted.num_batches_tracked == 0
    assert not scripted.running_mean.any()
