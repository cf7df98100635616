"""Filter pruning by torch-pruning: what goes, what stays, what is refused."""

import sys

import pytest
import torch
from torch import nn

from lr_callback.commands.study.pruning import prune_filters_
from lr_callback.common.example import Example
from lr_callback.recipes import CifarResNet

IMAGES = Example((torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(depth=8, in_channels=1).eval()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("keep_ratio", [0.8, 0.3, 0.1])
def test_the_network_is_small_enough_and_no_smaller_than_it_must(keep_ratio, norm):
    pytest.importorskip("torch_pruning")
    model = network()
    dense = size(model)
    prune_filters_(model, keep_ratio, model, IMAGES, norm)
    assert 0.85 * keep_ratio < size(model) / dense <= keep_ratio
    assert model(*IMAGES.arguments).shape == (2, 10)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_filters_without_effect_go_first():
    """Zero filters take nothing away from the outputs, whatever shortcut is around them."""
    pytest.importorskip("torch_pruning")
    model = network()
    for stage in (model.layer1, model.layer2, model.layer3):
        for part in (stage[0].conv1.weight, stage[0].bn1.weight, stage[0].bn1.bias):
            part.data[1::2] = 0
    wanted = model(*IMAGES.arguments)
    prune_filters_(model, 0.55, model, IMAGES)
    left = [stage[0].conv1.out_channels for stage in (model.layer1, model.layer2, model.layer3)]
    assert all(half <= count <= 1.1 * half for half, count in zip((8, 16, 32), left, strict=True))
    torch.testing.assert_close(model(*IMAGES.arguments), wanted)


def test_channels_that_a_shortcut_pads_stay():
    pytest.importorskip("torch_pruning")
    model = network()
    prune_filters_(model, 0.1, model, IMAGES)
    assert [model.conv1.out_channels, model.layer2[0].conv2.out_channels] == [16, 32]


def test_a_whole_group_goes_together_where_channels_keep_their_numbers():
    pytest.importorskip("torch_pruning")
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    prune_filters_(model, 0.5, model, IMAGES)
    assert model[0].out_channels == model[1].num_features == model[4].in_features // 36 == 3
    assert model[4].out_features == 10


def test_the_mode_stays_and_inputs_of_inference_mode_will_do():
    pytest.importorskip("torch_pruning")
    model = network().train()
    with torch.inference_mode():
        seen = Example((torch.zeros(2, 1, 8, 8),))
    prune_filters_(model, 0.5, model, seen)
    assert model.training and all(module.training for module in model.modules())


def test_a_size_that_cannot_be_reached_is_refused():
    pytest.importorskip("torch_pruning")
    model = network()
    with pytest.raises(ValueError, match=r"filter pruning: `keep_ratio` must be at least 0\.0\d+, .*, got 0\.01"):
        prune_filters_(model, 0.01, model, IMAGES)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch-pruning must be installed.*'lr_callback\[pruning\]'"):
        prune_filters_(network(), 0.5, network(), IMAGES)
