"""Rebasing: BatchNorm layers expect the variances that come into them, and the network in eval mode is the same."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.common.processes import Processes
from lr_callback.edits.surgery import standing_in
from lr_callback.recipes import CifarResNet
from lr_callback.repair.rebasing import rebasing
from tests.unit.repair.test_recalibrate import same, state

KINDS = {
    "1d": (nn.BatchNorm1d, ()),
    "1d, long": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (4, 3)),
    "3d": (nn.BatchNorm3d, (2, 2, 3)),
}


class Scaled(nn.Module):
    """A layer that changes how far its outputs vary, before a BatchNorm layer."""

    def __init__(self, norm: nn.Module, factor: torch.Tensor | float):
        super().__init__()
        self.factor, self.norm = factor, norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.factor * inputs)


def rebase(model, batches, factor=0.3, forward=None) -> None:
    """Let the inputs of a scaled model shrink."""
    with rebasing(model, nullcontext(), batches, forward, Processes()):
        model.factor = factor


@given(st.sampled_from(list(KINDS)), st.integers(0, 99), st.floats(0.01, 3), st.booleans())
def test_eval_mode_is_as_it_was_and_train_mode_no_longer_scales_up_what_has_shrunk(axes, seed, factor, settled):
    torch.manual_seed(seed)
    kind, sizes = KINDS[axes]
    model, inputs = Scaled(kind(6, eps=1e-12), 1.0).double(), torch.randn(32, 6, *sizes).double() + 2
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
        for _ in range(300 if settled else 3):
            model.train()(inputs)
    dense = model.train()(inputs).detach()
    cut = copy.deepcopy(model.eval())
    cut.factor = factor
    rebase(model, [inputs], factor)
    assert torch.allclose(model(inputs), cut(inputs), rtol=1e-4, atol=1e-4)
    middle = model.norm.bias.view(1, -1, *[1] * len(sizes))
    assert torch.allclose(cut.train()(inputs), dense, atol=1e-4), "train mode scales it up"
    assert torch.allclose(model.train()(inputs) - middle, factor * (dense - middle), atol=1e-4)


def test_statistics_that_have_not_settled_keep_their_distance():
    """What counts is how the inputs have changed: a network that has just begun is trained on as fast as before."""
    torch.manual_seed(0)
    model, inputs = Scaled(nn.BatchNorm1d(3), 1.0), 9 * torch.randn(256, 3)
    rebase(model, [inputs], 1.0)
    assert torch.allclose(model.norm.weight, torch.ones(3)) and torch.allclose(model.norm.running_var, torch.ones(3))
    rebase(model, [inputs], 0.5)
    assert torch.allclose(model.norm.weight, torch.full((3,), 0.5), atol=1e-3)
    assert torch.allclose(model.norm.running_var, torch.full((3,), 0.25), atol=1e-3)


def test_variances_are_those_of_all_batches_together():
    torch.manual_seed(0)
    model, batches = Scaled(nn.BatchNorm1d(3), 1.0), [torch.randn(8, 3) + 2 * step for step in range(4)]
    model.norm.running_var.copy_(torch.cat(batches).var(0, correction=0))
    rebase(model, batches, torch.tensor([0.5, 1.0, 2.0]))
    wanted = torch.tensor([0.25, 1.0, 4.0]) * torch.cat(batches).var(0, correction=0)
    assert torch.allclose(model.norm.running_var, wanted, rtol=1e-4)


def test_a_refitted_network_begins_to_train_as_it_is():
    """Without it each BatchNorm scales up what the layers before could not tell, and training begins far off."""
    torch.manual_seed(0)
    images = torch.randn(256, 3, 16, 16)
    model = CifarResNet(depth=20)
    with torch.no_grad():
        for _ in range(40):
            model.train()(images)
    wanted = model.eval()(images).detach()
    importance = lrc.collect_moments(model, [images])
    allocation = lrc.allocate(model, 0.2, method=lrc.ALDS("activation"), importance=importance)
    report = lrc.factorize_(model, allocation, importance=importance)
    norms = {name: state(one) for name, one in model.named_modules() if isinstance(one, nn.BatchNorm2d)}
    lrc.refit_(model, report.replaced, [images])
    other, fitted = copy.deepcopy(model), model(images).detach()
    for name, before in norms.items():
        norm = other.get_submodule(name)
        assert same(state(norm), before, but=("weight", "running_mean", "running_var"))
        norm.weight.data.copy_(before["weight"])
        norm.running_var.copy_(before["running_var"])
    assert torch.allclose(other(images), fitted, atol=1e-3)
    far, near = (nn.functional.mse_loss(one.train()(images), wanted) for one in (other, model))
    assert near < far / 2


def untrained(model):
    model.norm.weight.requires_grad_(False)


def shared(model):
    model.other = nn.BatchNorm1d(3)
    model.other.weight = model.norm.weight


def not_called(model):
    model.spare, model.norm = model.norm, nn.Identity()


class ChannelsAtTheEnd(nn.BatchNorm1d):
    def forward(self, inputs):
        return super().forward(inputs.unsqueeze(1).transpose(1, 2)).transpose(1, 2).squeeze(1)


class AboutOne(nn.BatchNorm1d):
    def forward(self, inputs):
        return nn.functional.batch_norm(inputs, self.running_mean, self.running_var, 1 + self.weight, self.bias)


def infinite(model):
    model.norm.running_var.fill_(torch.inf)


LEFT_ALONE = {
    "infinite statistics": infinite,
    "other axes": lambda model: setattr(model, "norm", ChannelsAtTheEnd(3)),
    "another use of the weight": lambda model: setattr(model, "norm", AboutOne(3)),
    "frozen": lambda model: model.norm.eval(),
    "shared": shared,
    "untrained": untrained,
    "not called": not_called,
    "no weight": lambda model: setattr(model, "norm", nn.BatchNorm1d(3, affine=False)),
    "no statistics": lambda model: setattr(model, "norm", nn.BatchNorm1d(3, track_running_stats=False)),
    "no BatchNorm": lambda model: setattr(model, "norm", nn.LayerNorm(3)),
}


@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=list(LEFT_ALONE))
def test_what_is_not_its_own_to_change_is_left_alone(change):
    model = Scaled(nn.BatchNorm1d(3), 1.0)
    change(model)
    before = state(model)
    rebase(model, [torch.randn(8, 3)])
    assert same(state(model), before)


def test_a_layer_whose_inputs_are_not_finite_is_left_alone_and_others_are_not():
    class Two(Scaled):
        def forward(self, inputs):
            return super().forward(inputs), self.other(self.factor * inputs.clamp(-1, 1))

    model = Two(nn.BatchNorm1d(2), 1.0)
    model.other = nn.BatchNorm1d(2)
    before = state(model.norm)
    rebase(model, [torch.randn(8, 2), torch.full((8, 2), torch.inf), torch.randn(8, 2)])
    assert same(state(model.norm), before)
    assert not torch.equal(model.other.running_var, torch.ones(2))


class Noted(nn.BatchNorm1d):
    """Writes more than tensors into a state dict."""

    def get_extra_state(self):
        return {"notes": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("spare", [Noted(3), nn.LazyBatchNorm1d()], ids=["extra state", "lazy"])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_other_layers_are_no_hindrance(spare):
    model = Scaled(nn.BatchNorm1d(3), 1.0)
    model.spare = spare
    rebase(model, [torch.randn(64, 3)])
    assert (model.norm.weight < 0.5).all()


def test_what_would_not_fit_the_dtype_stays():
    norm = nn.BatchNorm1d(2).half()
    norm.running_var.fill_(60000)
    model, inputs = Scaled(norm, torch.tensor([1.0, 1.0]).half()), torch.randn(64, 2).half()
    rebase(model, [inputs], torch.tensor([3.0, 0.5]).half())
    assert norm.running_var[0] == 60000 and norm.weight[0] == 1, "nine times as much is infinite"
    assert norm.weight[1].item() == pytest.approx(0.5, abs=1e-2)


def test_modes_momentum_counts_means_and_biases_are_left_alone():
    model = Scaled(nn.BatchNorm1d(3, momentum=None), 1.0).train()
    weight, before = model.norm.weight, state(model)
    rebase(model, [torch.randn(8, 3) + 1])
    assert model.training and model.norm.training
    assert model.norm.momentum is None and model.norm.weight is weight and weight.grad is None
    assert same(state(model), before, but=("norm.weight", "running_var"))


def test_channels_without_variance_stay_finite():
    model, inputs = Scaled(nn.BatchNorm1d(2), 1.0), torch.tensor([[3.0, -1.0], [3.0, 1.0]])
    model.norm.running_var.copy_(torch.tensor([0.0, 1e-9]))
    rebase(model, [inputs], 0.0)
    assert all(value.isfinite().all() and (value >= 0).all() for value in model.state_dict().values())


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_failure_leaves_all_as_it_was(where):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before, given = state(model), [torch.randn(8, 3)]
    batches = {"before": [], "inside": given, "after": iter(given)}[where]
    with (
        pytest.raises(ValueError, match=r"^`batches` must hold at least one calibration batch, got none\.$"),
        rebasing(model, standing_in(model, {}), batches, None, Processes()),
    ):
        model[1].running_mean += 1
        if where == "inside":
            lrc.refit_(model, {}, [])
    assert same(state(model), before)
