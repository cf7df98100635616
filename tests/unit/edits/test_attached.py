"""Plain attributes of a weight are on the weights in its place; hooks that cannot follow are warned of, by name."""

import warnings

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.edits.attached import copy_attributes


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def compress(model):
    return lrc.factorize_(model, lrc.allocate(model, 0.4))


def test_plain_attributes_are_copied_to_both_factors_and_back(model):
    options = {"lr": 0.1, "tags": ["slow"]}
    model[0].weight._no_weight_decay, model[0].weight._optim = True, options
    model[0].bias._no_weight_decay = False
    compress(model)
    for factor in model[0].factors:
        assert factor._no_weight_decay is True
        assert factor._optim == options and factor._optim is not options
    assert model[0].decoder.bias._no_weight_decay is False
    assert not hasattr(model[2].encoder.weight, "_no_weight_decay")
    lrc.densify_(model)
    assert model[0].weight._no_weight_decay is True


def test_state_dict_of_another_structure_keeps_them(model):
    model[0].weight._no_weight_decay = True
    trained = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    compress(trained)
    lrc.restore_(model, trained.state_dict())
    assert all(factor._no_weight_decay for factor in model[0].factors)


def test_what_torch_itself_writes_is_not_copied():
    old, new = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    old._dynamo_static_input_type, old.mine = "unguarded", 1
    copy_attributes(old, [new])
    assert vars(new) == {"mine": 1}


@pytest.mark.parametrize(
    "value", [torch.zeros(1), object(), [torch.zeros(1)], {"a": object()}], ids=["tensor", "object", "list", "dict"]
)
def test_attributes_that_are_not_copied_are_warned_of(model, value):
    model[2].weight.scale = value
    with pytest.warns(UserWarning, match=r"are not copied .*found 2 \(scale\)\. Set them again on `layer\.encoder"):
        compress(model)
    assert not any(hasattr(factor, "scale") for factor in model[2].factors)


def test_hook_on_a_weight_is_warned_of_with_the_layer(model):
    model[2].weight.register_hook(lambda gradient: None)
    model[0].bias.register_hook(lambda gradient: None)
    match = r"A hook on the gradient .* found some at 2\. Register it again .*or name the layers in `exclude`"
    with pytest.warns(UserWarning, match=match):
        compress(model)


def test_hook_that_was_removed_and_one_on_a_layer_that_stays_are_not_warned_of(model):
    model[2].weight.register_hook(lambda gradient: None).remove()
    model[0].weight.register_hook(lambda gradient: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrc.factorize_(model, lrc.allocate(model, 0.8, exclude=["0"]))


def test_warning_that_is_an_error_leaves_everything_as_it_was(model):
    model[0].weight.register_hook(lambda gradient: None)
    layers = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="A hook on the gradient"):
            compress(model)
    assert list(model) == layers
