"""Rebasing: statistics of BatchNorm layers are those of their inputs, and the network in eval mode is the same."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.rebasing import rebase_batchnorm_
from lr_callback.recipes import CifarResNet

KINDS = {
    1: (nn.BatchNorm1d, ()),
    2: (nn.BatchNorm1d, (5,)),
    3: (nn.BatchNorm2d, (4, 3)),
    4: (nn.BatchNorm3d, (2, 3, 2)),
}


def drawn(norm: nn.Module) -> nn.Module:
    """Give a BatchNorm layer a past."""
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
    return norm


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@given(st.sampled_from(list(KINDS)), st.integers(0, 99), st.floats(0.01, 30), st.floats(-20, 20))
def test_train_mode_gives_what_eval_mode_gave(axes, seed, deviation, mean):
    torch.manual_seed(seed)
    kind, sizes = KINDS[axes]
    norm, inputs = drawn(kind(6)).double(), mean + deviation * torch.randn(32, 6, *sizes).double()
    before = norm.eval()(inputs).detach()
    assert rebase_batchnorm_(norm, [inputs]) == 1
    assert torch.allclose(norm(inputs), before, atol=1e-6)
    assert torch.allclose(norm.train()(inputs), before, atol=1e-6)


def test_statistics_are_those_of_all_batches_together():
    torch.manual_seed(0)
    norm, batches = drawn(nn.BatchNorm1d(3)), [torch.randn(8, 3) + 2 * step for step in range(4)]
    rebase_batchnorm_(norm, batches)
    together = torch.cat(batches)
    assert torch.allclose(norm.running_mean, together.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, together.var(0, correction=0), atol=1e-5)


def test_a_refitted_network_begins_to_train_as_it_is():
    """Without it each BatchNorm scales up what the layers before could not tell, and the loss begins far off."""
    torch.manual_seed(0)
    images = torch.randn(256, 3, 16, 16)
    model = CifarResNet(depth=20)
    for _ in range(3):
        model.train()(images)  # statistics of something
    wanted = model.eval()(images).detach()
    importance = lrc.collect_moments(model, [images])
    allocation = lrc.allocate(model, 0.2, method=lrc.ALDS("activation"), importance=importance)
    report = lrc.factorize_(model, allocation, importance=importance)
    lrc.refit_(model, report.replaced, [images])
    other, before = copy.deepcopy(model), model(images).detach()
    assert lrc.rebase_batchnorm_(model, [images]) == 19
    assert torch.allclose(model(images), before, atol=1e-3)
    far, near = (nn.functional.mse_loss(one.train()(images), wanted) for one in (other, model))
    assert torch.allclose(model(images), before, atol=1e-2)
    assert near < far / 2


def frozen():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].eval()
    return model


def shared():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    return model


def untrained():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    return model


def not_called():
    model = nn.Sequential(nn.Identity())
    model[0].spare = nn.BatchNorm1d(3)
    return model


LEFT_ALONE = {
    "frozen": frozen,
    "shared": shared,
    "untrained": untrained,
    "not called": not_called,
    "no weight": lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False)),
    "no statistics": lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
    "no BatchNorm": lambda: nn.Sequential(nn.LayerNorm(3)),
}


@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=list(LEFT_ALONE))
def test_what_is_not_its_own_to_change_is_left_alone(make):
    model = make()
    before = state(model)
    assert rebase_batchnorm_(model, [torch.randn(8, 3) + 5]) == 0
    assert same(state(model), before)


def test_a_layer_whose_inputs_are_not_finite_is_left_alone_and_others_are_not():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    before = state(model[0])
    batches = [torch.randn(8, 2), torch.full((8, 2), torch.inf), torch.randn(8, 2)]
    forward = lambda batch: (model[0](batch), model[1](batch.clamp(-1, 1)))  # noqa: E731
    assert rebase_batchnorm_(model, batches, forward) == 1
    assert same(state(model[0]), before)
    assert not torch.equal(model[1].running_var, torch.ones(2))


def test_modes_momentum_and_counts_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Dropout(0.5)).train()
    weight = model[0].weight
    rebase_batchnorm_(model, [torch.randn(8, 3)])
    assert model.training and model[0].training and model[1].training
    assert (model[0].momentum, int(model[0].num_batches_tracked)) == (None, 0)
    assert model[0].weight is weight and weight.grad is None


def test_a_constant_channel_and_one_of_no_variance_before_stay_finite():
    norm = nn.BatchNorm1d(2)
    norm.running_var.copy_(torch.tensor([1.0, 0.0]))
    inputs = torch.tensor([[3.0, -1.0], [3.0, 1.0]])
    before = norm.eval()(inputs).detach()
    rebase_batchnorm_(norm, [inputs])
    assert torch.allclose(norm(inputs), before, rtol=1e-4)
    assert torch.allclose(norm.train()(inputs), before, rtol=1e-4)


def test_no_batches_are_refused_and_nothing_is_changed():
    model = nn.Sequential(drawn(nn.BatchNorm1d(3)))
    before = state(model)
    with pytest.raises(ValueError, match=r"^`batches` must hold at least one calibration batch, got none\.$"):
        rebase_batchnorm_(model, [])
    assert same(state(model), before)
