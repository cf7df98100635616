"""Factorized models are modules as any other: copied, pickled, moved, cast, shared, called with other parameters."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.multiprocessing import get_context

import lr_callback as lrc
from lr_callback.layers import FactorizedLayer


def network():
    torch.manual_seed(0)
    first, second = nn.Linear(64, 32), nn.Linear(32, 8)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), first, nn.ReLU(), second)


def compressed():
    model = network()
    assert len(lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized) == 3
    return model.eval()


@pytest.fixture
def inputs():
    return torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def layers_of(model):
    return [layer for layer in model if isinstance(layer, FactorizedLayer)]


def through_a_file(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@pytest.mark.situation("Factorized models", "copied, pickled, saved whole", "works")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), through_a_file])
def test_a_copy_computes_the_same_and_shares_nothing(copied, inputs):
    model = compressed()
    twin, outputs = copied(model), model(inputs)
    assert torch.equal(twin(inputs), outputs)
    assert repr(twin) == repr(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(inputs), outputs)
    assert lrc.densify_(copied(model)).densified == ("0", "3", "5")


@pytest.mark.situation("Factorized models", "cast and moved", "works")
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda model: model.to(torch.float64), torch.float64),
        (lambda model: model.double(), torch.float64),
        (lambda model: model.half(), torch.float16),
        (lambda model: model.bfloat16(), torch.bfloat16),
    ],
    ids=["to", "double", "half", "bfloat16"],
)
def test_a_cast_reaches_both_factors_and_the_product(cast, dtype, inputs):
    model = compressed()
    outputs = model(inputs)
    cast(model)
    assert {one.dtype for one in model.parameters()} == {dtype} == {layer.weight.dtype for layer in layers_of(model)}
    assert torch.allclose(model(inputs.to(dtype)).float(), outputs, atol=2e-2)
    lrc.densify_(model)
    assert {one.dtype for one in model.parameters()} == {dtype}


def test_a_model_goes_to_another_device_and_its_place_is_kept_for_values():
    model = compressed()
    state = model.state_dict()
    model.to("meta")
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert model(torch.ones(2, 4, 4, 4, device="meta")).shape == (2, 8)
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(torch.ones(2, 4, 4, 4)), compressed()(torch.ones(2, 4, 4, 4)))


def add_one(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.situation("Factorized models", "share_memory", "works")
def test_memory_is_shared_with_another_process():
    model = compressed().share_memory()
    before = [one.clone() for one in model.parameters()]
    process = get_context("fork").Process(target=add_one, args=(model,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert all(torch.equal(one, other + 1) for one, other in zip(model.parameters(), before, strict=True))


@pytest.mark.situation("Factorized models", "torch.func: functional_call, vmap, grad", "works")
def test_gradients_of_each_sample_are_those_of_one_at_a_time(inputs):
    model = compressed()
    values = {name: one.detach() for name, one in model.named_parameters()}
    fixed = dict(model.named_buffers())

    def loss(parameters, sample):
        return functional_call(model, (parameters, fixed), sample[None]).square().sum()

    at_once = vmap(grad(loss), (None, 0))(values, inputs)
    for number, sample in enumerate(inputs):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for name, one in model.named_parameters():
            torch.testing.assert_close(at_once[name][number], one.grad, rtol=1e-4, atol=1e-5)


def test_an_ensemble_runs_as_one(inputs):
    models = [compressed(), compressed()]
    with torch.no_grad():
        for one in models[1].parameters():
            one.mul_(0.5)
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda *state: functional_call(models[0], state, inputs))(parameters, buffers)
    for each, model in zip(outputs, models, strict=True):
        torch.testing.assert_close(each, model(inputs))


@pytest.mark.situation("Factorized models", "parameters as one vector, initialized by apply", "works")
def test_parameters_as_a_vector_and_back(inputs):
    model = compressed()
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.numel() == lrc.allocate(network(), 0.5).cost
    nn.utils.vector_to_parameters(torch.zeros_like(vector), model.parameters())
    assert not model(inputs).any()
    assert not any(layer.weight.any() for layer in layers_of(model))


@pytest.mark.parametrize("by", ["type", "weight"])
def test_a_function_that_initializes_reaches_the_factors(by, inputs):
    model = compressed()

    def initialize(module):
        known = isinstance(module, (nn.Linear, nn.Conv2d)) if by == "type" else hasattr(module, "weight")
        if known and not isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.ones_(module.bias)

    model.apply(initialize)
    assert all(not layer.decoder.weight.any() and bool((layer.bias == 1).all()) for layer in layers_of(model))
    assert bool((model[5](torch.randn(3, 32)) == 1).all())


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(8, 32)), torch.ones(8, 32)], ids=["parameter", "tensor"])
def test_a_weight_that_is_set_is_refused_by_torch(value):
    layer = compressed()[5]
    before = layer.weight.clone()
    with pytest.raises((KeyError, AttributeError), match="weight"):
        layer.weight = value
    assert torch.equal(layer.weight, before)
