"""Patterns: layers are meant by name, by type or by place, and what means none of them is told of."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.model.find import find_layers


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 8)
    )


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, ["0", "2", "4", "5"]),
        (["type:Linear"], None, ["4", "5"]),
        (None, "type:torch.nn.modules.conv.*", ["4", "5"]),
        ("type:torch.nn.Linear", None, ["4", "5"]),
        ("type:Conv*", "place:first", ["2"]),
        (None, ["place:first", "place:last"], ["2", "4"]),
        (["place:last", "0"], None, ["0", "5"]),
        (["type:Linear", "type:Conv2d"], ["place:last"], ["0", "2", "4"]),
    ],
)
def test_layers_are_meant_by_name_type_or_place(include, exclude, left):
    assert list(find_layers(network(), include, exclude).layers) == left


def test_a_factorized_layer_is_of_the_type_that_it_stands_for():
    model = network()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert list(find_layers(model, exclude="type:Conv2d").layers) == ["4", "5"]
    assert list(find_layers(model, exclude="place:first").layers) == ["2", "4", "5"]


def test_first_and_last_are_among_the_layers_that_can_be_factorized():
    model = nn.Sequential(nn.Bilinear(4, 4, 4), nn.Linear(16, 16), nn.Linear(16, 16), nn.Bilinear(4, 4, 4))
    assert list(find_layers(model, exclude=["place:first"]).layers) == ["2"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (
            "type:LSTM",
            r"`exclude`: each pattern must match a layer's type, 'type:LSTM' matches none of: Conv2d, Linear\.",
        ),
        ("layer9.*", r"`exclude`: each pattern must match a layer's name, 'layer9\.\*' matches none of: 0, 2, 4, 5\."),
        ("place:middle", r"`exclude`: a place must be 'place:first' or 'place:last', got 'place:middle'\."),
    ],
)
def test_a_pattern_that_means_no_layer_is_refused(pattern, text):
    with pytest.raises(ValueError, match=text):
        find_layers(network(), exclude=[pattern])


def test_a_model_without_layers_has_no_first_one():
    with pytest.raises(ValueError, match=r"'place:first' matches none of: \(the model has no layers with a weight\)"):
        find_layers(nn.Sequential(nn.ReLU()), exclude="place:first")


def test_the_callback_refuses_a_place_that_there_is_not_at_once():
    with pytest.raises(ValueError, match="`include`: a place must be 'place:first' or 'place:last', got 'place:top'"):
        lrc.LowRankCompression(include=["place:top"])
    assert torch.is_grad_enabled()


def test_full_names_of_types_hold_after_a_cut():
    model = network()
    whole = "type:torch.nn.modules.conv.Conv2d"
    before = list(find_layers(model, include=[whole]).layers)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert list(find_layers(model, include=[whole]).layers) == before == ["0", "2"]


def test_embeddings_are_neither_first_nor_last():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(9, 8))
    assert list(find_layers(model, exclude=["place:first"]).layers) == ["0", "2", "3"]
    assert list(find_layers(model, include=["place:last"]).layers) == ["2"]
