"""Following: whose outputs a BatchNorm takes, and whether a constant added to both would show."""

import pytest
import torch
from torch import nn

from lr_callback.model.following import follow


class Net(nn.Module):
    """A convolution and the BatchNorm after it, put together in some way."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.way = way

    def forward(self, inputs):
        return self.way(self, self.conv(inputs))


def leaky(self, outputs):
    normed = self.norm(outputs)
    return normed, [outputs]


SOLE = {
    "directly": lambda self, outputs: self.norm(outputs),
    "looked at": lambda self, outputs: self.norm(outputs) if outputs.shape[1] == 4 and outputs.dim() == 4 else None,
    "twice": lambda self, outputs: self.norm(outputs) + self.norm(self.conv(torch.ones(2, 3, 5, 5))),
}
SHARED = {
    "added": lambda self, outputs: self.norm(outputs) + outputs,
    "before": lambda self, outputs: outputs.mean() + self.norm(outputs),
    "in a list": lambda self, outputs: torch.cat([self.norm(outputs), outputs]),
    "returned": leaky,
    "changed in place": lambda self, outputs: self.norm(outputs.relu_()),
    "another input": lambda self, outputs: self.norm(outputs) + self.norm(outputs * 2),
    "not at all": lambda self, outputs: outputs,
}


@pytest.mark.parametrize("way", [*SOLE, *SHARED])
def test_a_batchnorm_is_a_taker_if_a_constant_added_to_both_would_not_show(way):
    torch.manual_seed(0)
    model, inputs = Net({**SOLE, **SHARED}[way]).eval(), torch.randn(2, 3, 5, 5)
    found = follow(model, [inputs, "is not run"], None, [model.conv])
    assert found.takers() == ({model.conv: model.norm} if way in SOLE else {})
    before = model(inputs)
    with torch.no_grad():
        handle = model.conv.register_forward_hook(lambda *call: call[2] + torch.arange(4.0).view(1, 4, 1, 1))
        model.norm.running_mean += torch.arange(4.0)
        after = model(inputs)
        handle.remove()
    if way in SOLE:
        torch.testing.assert_close(after, before)
    elif way != "not at all":
        flat = [torch.cat([one.flatten() for one in torch.utils._pytree.tree_leaves(some)]) for some in (before, after)]
        assert not torch.allclose(*flat, atol=1e-2)
    assert not model.norm._forward_hooks and not model.norm._forward_pre_hooks


def test_layers_are_counted_in_the_order_of_their_calls():
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(last, nn.BatchNorm1d(3), first, last)
    found = follow(model, [torch.randn(4, 3)], None, [first, last])
    assert list(found.calls.items()) == [(last, 2), (first, 1)] and found.takers() == {}
