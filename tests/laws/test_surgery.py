"""Laws 4 and 6: surgery is idempotent, keeps what is not its business, and is all or nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.edits import build
from lr_callback.layers import FactorizedLayer
from lr_callback.mathematics.folding import FOLDINGS

law = settings(max_examples=20, deadline=None)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ratios = st.floats(0.2, 1.0)


class Network(nn.Module):
    """Convolutions, BatchNorm, a layer that is used twice under two names, and one that cannot be factorized."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2))
        shared = nn.Linear(24, 24)
        self.twice = nn.ModuleList([shared, shared])
        self.head = nn.Linear(24, 10)

    def forward(self, inputs):
        features = self.body(self.depthwise(self.norm(self.stem(inputs)))).mean((2, 3))
        for layer in self.twice:
            features = torch.relu(layer(features))
        return self.head(features)


def bits(model, optimizers=()):
    """Return everything that a user can see of a model and its optimizers, with the identity of each object."""
    modules = [(name, id(one), one.training) for name, one in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(one), one.requires_grad) for name, one in model.named_parameters(remove_duplicate=False)]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [[[id(one) for one in group["params"]] for group in each.param_groups] for each in optimizers]
    options = [[{k: v for k, v in g.items() if k != "params"} for g in each.param_groups] for each in optimizers]
    states = [{id(key): dict(value) for key, value in each.state.items()} for each in optimizers]
    return modules, parameters, values, groups, copy.deepcopy(options), states


def same(one, other):
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def trained(model, *optimizers):
    """Make one step, so that the optimizers have state."""
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


@law
@given(keep_ratio=ratios, seed=st.integers(0, 9))
def test_doing_it_twice_is_doing_it_once(keep_ratio, seed):
    model = Network(seed)
    allocation = lrc.allocate(model, keep_ratio)
    first = lrc.factorize_(model, allocation)
    before = bits(model)
    again = lrc.factorize_(model, allocation)
    assert same(bits(model), before)
    assert again.factorized == again.densified == ()
    assert set(again.unchanged) == set(first.factorized)


@law
@given(keep_ratio=ratios)
def test_the_other_modules_keep_their_names_and_stay_the_same_objects(keep_ratio):
    model = Network()
    before = dict(model.named_modules(remove_duplicate=False))
    allocation = lrc.allocate(model, keep_ratio)
    report = lrc.factorize_(model, allocation)
    after = dict(model.named_modules(remove_duplicate=False))
    assert set(before) <= set(after)
    replaced = {name for name in before if before[name] is not after[name]}
    assert {name for name in replaced if name != "twice.1"} == set(report.factorized) == set(allocation.factorized)


@law
@given(first=ratios, second=ratios)
def test_a_shared_layer_is_replaced_once_and_stays_shared(first, second):
    model = Network()
    for keep_ratio in (first, second):
        lrc.factorize_(model, lrc.allocate(model, keep_ratio))
        assert model.twice[0] is model.twice[1]
    lrc.densify_(model)
    assert model.twice[0] is model.twice[1]
    assert type(model.twice[0]) is nn.Linear


@law
@given(keep_ratio=ratios, data=st.data())
def test_modes_and_frozen_parameters_stay_as_they_were(keep_ratio, data):
    model = Network()
    names = ["stem", "body.0", "body.2", "twice.0", "head"]
    modes = {name: data.draw(st.booleans()) for name in names}
    frozen = {name: data.draw(st.booleans()) for name in names}
    for name in names:
        model.get_submodule(name).train(modes[name])
        model.get_submodule(name).weight.requires_grad_(not frozen[name])
    bias = model.head.bias
    report = lrc.factorize_(model, lrc.allocate(model, keep_ratio))
    for name in report.factorized:
        layer = model.get_submodule(name)
        assert {module.training for module in layer.modules()} == {modes[name]}
        assert {factor.requires_grad for factor in layer.factors} == {not frozen[name]}
    lrc.densify_(model)
    assert {name: model.get_submodule(name).training for name in names} == modes
    assert {name: not model.get_submodule(name).weight.requires_grad for name in names} == frozen
    assert model.head.bias is bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("folding", list(FOLDINGS))
def test_device_dtype_and_memory_format_survive(device, dtype, memory_format, folding):
    model = Network().to(device=device, dtype=dtype).to(memory_format=memory_format)
    lrc.factorize_(model, lrc.allocate(model, 0.3, method=lrc.ALDS(foldings=[folding])))
    assert {one.device.type for one in model.parameters()} == {device}
    assert {one.dtype for one in model.parameters()} == {dtype}
    assert isinstance(model.body[0], FactorizedLayer)
    assert all(one.is_contiguous(memory_format=memory_format) for one in model.body[0].factors)
    lrc.densify_(model)
    assert model.body[0].weight.is_contiguous(memory_format=memory_format)


def test_forward_hooks_survive_and_the_handles_of_users_still_remove_them():
    model, calls = Network(), []
    before = model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    after = model.head.register_forward_hook(lambda *_: calls.append("after"))
    backward = model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    lrc.factorize_(model, lrc.allocate(model, 0.4))
    assert isinstance(model.head, lrc.FactorizedLinear)
    trained(model)
    assert calls == ["before", "after", "backward"]
    lrc.densify_(model)
    for handle in (before, after, backward):
        handle.remove()
    trained(model)
    assert calls == ["before", "after", "backward"]


def test_a_layer_that_is_left_out_is_listed_with_its_reason():
    allocation = lrc.allocate(Network(), 0.5, exclude="head")
    assert allocation.skipped == {
        "depthwise": "a depthwise convolution: no rank costs less than the dense layer",
        "head": "named by `exclude`",
    }
    assert "skipped depthwise: a depthwise convolution" in str(allocation)


class Failing(torch.optim.SGD):
    """An optimizer that breaks when its groups are asked for the given time."""

    left = None

    @property
    def param_groups(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("groups broke")
        return self._groups

    @param_groups.setter
    def param_groups(self, groups):
        self._groups = groups


@pytest.mark.parametrize("nth", range(3))
def test_nothing_changes_if_an_optimizer_fails(nth):
    model = Network()
    first = torch.optim.Adam([*model.body.parameters(), *model.stem.parameters()])
    second = Failing([*model.twice[0].parameters(), *model.head.parameters()], lr=0.1, momentum=0.9)
    trained(model, first, second)
    allocation = lrc.allocate(model, 0.3)
    before = bits(model, [first, second])
    second.left = nth
    with pytest.raises(RuntimeError, match="groups broke"):
        lrc.factorize_(model, allocation, optimizers=[first, second])
    second.left = None
    assert same(bits(model, [first, second]), before)


@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_if_a_decomposition_fails(nth, error, monkeypatch):
    model, done = Network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    allocation = lrc.allocate(model, 0.3)
    assert len(allocation.factorized) == 5
    before, truncate = bits(model, [optimizer]), build.truncate

    def fail(*arguments):
        done.append(1)
        if len(done) > nth:
            raise error("out of memory")
        return truncate(*arguments)

    monkeypatch.setattr(build, "truncate", fail)
    with pytest.raises(error, match="out of memory"):
        lrc.factorize_(model, allocation, optimizers=optimizer)
    assert len(done) == nth + 1
    assert same(bits(model, [optimizer]), before)


class Stubborn(dict):
    """Children of a module, of which the named one cannot be replaced."""

    def __setitem__(self, name, child):
        if name == "head" and isinstance(child, FactorizedLayer):
            raise RuntimeError("no")
        super().__setitem__(name, child)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.LBFGS])
def test_nothing_changes_if_the_swap_itself_is_interrupted(make):
    model = Network()
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.step(lambda: loss_of(model, optimizer))
    model._modules = Stubborn(model._modules)
    allocation = lrc.allocate(model, 0.3)
    before, cache = bits(model, [optimizer]), getattr(optimizer, "_numel_cache", None)
    with pytest.raises(RuntimeError, match="no"):
        lrc.factorize_(model, allocation, optimizers=optimizer)
    assert same(bits(model, [optimizer]), before)
    assert getattr(optimizer, "_numel_cache", None) == cache
    optimizer.step(lambda: loss_of(model, optimizer))


def loss_of(model, optimizer):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3, 8, 8)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("change", ["missing", "shape", "slices", "rank"])
def test_nothing_changes_if_the_allocation_does_not_fit(change):
    model = Network()
    allocation = lrc.allocate(model, 0.4).to_dict()
    layer = allocation["layers"]["head"]
    if change == "missing":
        allocation["layers"]["tail"], allocation["shapes"]["tail"] = layer, [10, 24]
    elif change == "shape":
        allocation["shapes"]["head"] = [11, 24]
    else:
        layer.update({"num_slices": 7} if change == "slices" else {"rank": 25})
    before = bits(model)
    with pytest.raises(ValueError, match="Nothing was changed"):
        lrc.factorize_(model, lrc.Allocation.from_dict(allocation))
    assert same(bits(model), before)
