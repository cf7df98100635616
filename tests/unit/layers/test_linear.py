"""Linear layers in slices; the Conv1D of transformers, and that nothing of transformers is imported for it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.layers.layer_types import LAYER_TYPES


def test_a_conv1d_of_transformers_is_factorized_and_made_dense_again():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 32), nn.Tanh(), Conv1D(32, 24))
    lrc.factorize_(model, lrc.allocate(model, 0.6))
    assert {type(model[0]), type(model[2])} == {lrc.FactorizedConv1D}
    inputs, layer = torch.randn(2, 3, 32), model[0]
    assert (layer.nf, layer.nx, layer.weight.shape) == (24, 32, (32, 24))
    assert torch.equal(layer(x=inputs), layer(inputs))
    assert torch.allclose(layer(inputs), inputs @ layer.weight + layer.bias, atol=1e-5)
    outputs = model(inputs)
    lrc.densify_(model)
    assert type(model[0]) is Conv1D
    assert torch.allclose(model(inputs), outputs, atol=1e-5)


def test_multiply_adds_of_a_conv1d_that_is_called_by_name():
    from transformers.pytorch_utils import Conv1D

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Conv1D(24, 32)

        def forward(self, inputs):
            return self.layer(x=inputs)

    model, inputs = Named(), torch.zeros(2, 5, 32)
    for _ in range(2):  # dense, then factorized
        allocation = lrc.allocate(model, 0.5, cost="multiply_adds", example_input=inputs)
        assert allocation.dense_cost == 10 * 24 * 32
        lrc.factorize_(model, allocation)


def test_the_core_does_not_import_transformers():
    code = (
        "import sys, torch, lr_callback as lrc\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "lrc.factorize_(model, lrc.allocate(model, 0.5)); lrc.densify_(model)\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_encoder_of_one_slice_is_a_linear_that_other_tools_look_for():
    assert type(lrc.FactorizedLinear(nn.Linear(8, 4), 1, 2).encoder) is nn.Linear


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
def test_factorized_linears_are_scripted():
    model = nn.Sequential(nn.Linear(32, 32))
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert torch.allclose(torch.jit.script(model)(torch.ones(2, 3, 32)), model(torch.ones(2, 3, 32)))


def test_slices_are_traced_by_fx_and_batched_by_vmap():
    model, inputs = nn.Sequential(lrc.FactorizedLinear(nn.Linear(12, 5), num_slices=3, rank=2)), torch.randn(7, 12)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(inputs), model(inputs))
    torch.testing.assert_close(torch.func.vmap(model)(inputs), model(inputs))


def test_initialization_that_asks_for_a_bias_finds_none():
    layer = lrc.FactorizedLinear(nn.Linear(12, 5), num_slices=3, rank=2)
    assert layer.encoder.bias is None
    assert "encoder.bias" not in layer.state_dict()


SUBCLASSES = {
    "timm.layers.linear.Linear": ((16, 24), (2, 16)),
    "transformers.models.falcon.modeling_falcon.FalconLinear": ((16, 24), (2, 3, 16)),
    "torchvision.models.video.resnet.Conv3DSimple": ((16, 24, None, 2, 1), (1, 16, 4, 5, 6)),
    "torchvision.models.video.resnet.Conv3DNoTemporal": ((16, 24, None, 2, 1), (1, 16, 4, 5, 6)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_that_compute_what_torch_s_class_does_are_factorized(name):
    package, _, kind = name.rpartition(".")
    arguments, shape = SUBCLASSES[name]
    torch.manual_seed(0)
    layer, inputs = getattr(pytest.importorskip(package), kind)(*arguments), torch.randn(shape)
    parent = type(layer).__mro__[1]
    assert parent in {nn.Linear, nn.Conv3d}
    torch.testing.assert_close(layer(inputs), parent.forward(layer, inputs))
    model = nn.Sequential(layer)
    allocation = lrc.allocate(model, 0.7)
    lrc.factorize_(model, allocation)
    assert sum(one.numel() for one in model.parameters()) == allocation.cost
    outputs = model(inputs)
    fresh = nn.Sequential(getattr(pytest.importorskip(package), kind)(*arguments))
    lrc.restore_(fresh, model.state_dict())
    assert torch.equal(fresh(inputs), outputs)
    lrc.densify_(model)
    assert type(model[0]) is parent
    torch.testing.assert_close(model(inputs), outputs)


def test_all_types_that_are_not_torchs_are_of_the_classes_that_they_are_taken_for():
    assert {name for name in LAYER_TYPES if not name.startswith("torch.nn.")} == {
        *SUBCLASSES,
        "transformers.pytorch_utils.Conv1D",
        "lr_callback.tuning.pointwise.PointwiseLinear",
    }


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
def test_factorized_conv1d_of_transformers_is_scripted():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(32, 32))
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert type(model[0]) is lrc.FactorizedConv1D
    inputs = torch.randn(2, 3, 32)
    assert torch.allclose(torch.jit.script(model)(inputs), model(inputs))
