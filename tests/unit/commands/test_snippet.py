"""Python in a page: it runs, and gives the network of the configuration."""

from pathlib import Path

import torch
from torch import nn

import lr_callback as lrc
from lr_callback.commands.snippet import loading_code

CONFIGURED = {
    "class_path": "lr_callback.recipes.ImageClassifier",
    "init_args": {
        "network": {"class_path": "lr_callback.recipes.CifarResNet", "init_args": {"depth": 8, "weights": None}},
        "milestones": [3, 5],
        "schedule": "constant",
    },
}


def test_it_runs_and_gives_the_network_of_a_file(tmp_path):
    names = {}
    exec(loading_code(CONFIGURED, Path("unused")).partition("lrc.restore_")[0], names)
    model = names["model"]
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    file = tmp_path / 'with "quotes" and it\'s.ckpt'
    torch.save({"state_dict": model.state_dict()}, file)
    exec(loading_code(CONFIGURED, file), names)
    assert names["model"] is not model and not names["model"].training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in names["model"].state_dict().items())


def test_of_an_unknown_network_the_place_is_left_open():
    text = loading_code(None, Path("a.ckpt"))
    assert "model = ...  # your network, as the code makes it: dense" in text
    assert "lrc.restore_(model, 'a.ckpt')" in text


def test_a_class_without_arguments_and_nested_values():
    text = loading_code({"class_path": "torch.nn.Identity"}, Path("a"))
    assert "model = Identity()" in text
    names = {}
    described = {
        "class_path": "builtins.dict",
        "init_args": {"a": {"b": [1, (2.5, "c")]}, "d": {"class_path": "torch.nn.ReLU"}},
    }
    exec(loading_code(described, Path("a")).partition("lrc.restore_")[0], names)
    assert names["model"]["a"] == {"b": [1, [2.5, "c"]]} and isinstance(names["model"]["d"], nn.ReLU)
