"""Ten failures of composer's Factorize, one test each: what users met there must not happen here."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc

KEEP = 0.4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def factorized(model, keep_ratio=KEEP, **options):
    """Compress a model and check that something was done."""
    optimizers = options.pop("optimizers", ())
    report = lrc.factorize_(model, lrc.allocate(model, keep_ratio, **options), optimizers=optimizers)
    assert report.factorized
    return report


def low_rank(rows, columns, rank):
    """Return a matrix of exactly this rank."""
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)


def test_1_trained_weights_are_kept_an_exactly_low_rank_layer_loses_nothing():
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(low_rank(48, 64, 8))
    inputs = torch.randn(16, 64, dtype=torch.float64)
    before = model(inputs)
    allocation = lrc.allocate(model, (8 * (48 + 64) + 48) / (48 * 64 + 48), method=lrc.ALDS(max_slices=1))
    assert allocation.layers["0"].rank == 8
    lrc.factorize_(model, allocation)
    assert (model(inputs) - before).norm() / before.norm() < 1e-10


def test_2_a_convolution_without_bias_stays_without_one():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.Conv2d(32, 32, 3))
    factorized(model)
    assert isinstance(model[0], lrc.FactorizedConv2d)
    assert isinstance(model[1], lrc.FactorizedConv2d)
    assert model[0].bias is None
    assert sorted(name for name, _ in model[0].named_parameters()) == ["decoder.weight", "encoder.weight"]
    assert model[1].bias is not None


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_3_the_padding_mode_is_kept(padding_mode):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, padding_mode=padding_mode, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(low_rank(16, 72, 2).reshape(16, 8, 3, 3))
    inputs = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    before = model(inputs)
    factorized(model, method=lrc.ALDS(max_slices=1))
    assert model[0].padding_mode == padding_mode
    assert torch.allclose(model(inputs), before, rtol=1e-10, atol=1e-10)


def test_4_a_second_pass_does_not_factorize_the_factors():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    factorized(model)
    first = [model[0], model[2]]
    names = [name for name, _ in model.named_modules()]
    report = lrc.factorize_(model, lrc.allocate(model, KEEP))
    assert [name for name, _ in model.named_modules()] == names
    assert not any(isinstance(part, lrc.FactorizedLinear) for layer in first for part in list(layer.modules())[1:])
    assert report.parameters_after <= KEEP * (2 * 64 * 64 + 2 * 64)


def test_5_a_frozen_layer_stays_frozen_and_out_of_the_optimizer():
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    report = factorized(model, optimizers=optimizer)
    assert report.factorized == ("0", "2")
    assert not any(one.requires_grad for one in model[0].parameters())
    held = {id(one) for one in optimizer.param_groups[0]["params"]}
    assert held == {id(one) for one in model[2].parameters()}
    frozen = copy.deepcopy(model[0].state_dict())
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())


def test_6_weight_and_bias_may_be_in_different_parameter_groups():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "lr": 1e-2}], lr=1e-3
    )
    factorized(model, optimizers=optimizer)
    decayed, plain = optimizer.param_groups
    assert [id(one) for one in decayed["params"]] == [id(one) for i in (0, 2) for one in model[i].factors]
    assert [id(one) for one in plain["params"]] == [id(one) for one in biases]
    assert (decayed["weight_decay"], plain["weight_decay"], plain["lr"]) == (0.1, 0.0, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_7_dtype_and_eval_mode_are_kept(dtype):
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 64)).to(dtype).eval()
    factorized(model)
    assert all(one.dtype == dtype for one in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model(torch.randn(2, 16, 3, 3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_8_multihead_attention_still_works(training):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.head = nn.Linear(32, 32)

        def forward(self, inputs):
            return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0])

    model = Block().train(training)
    before = copy.deepcopy(model.attention.state_dict())
    allocation = lrc.allocate(model, 0.9)
    assert (
        allocation.skipped["attention.out_proj"]
        == "read directly by nn.MultiheadAttention; split_attention_(model) makes layers of it"
    )
    report = lrc.factorize_(model, allocation)
    assert report.factorized == ("head",)
    assert model(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.attention.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(nn.Linear(64, 64, bias=False), (4, 64)), (nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), (4, 16, 8, 8))],
    ids=["linear without bias", "strided convolution"],
)
def test_9_the_rank_can_change_again_and_the_optimizer_keeps_no_dead_parameters(layer, inputs):
    model = nn.Sequential(copy.deepcopy(layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    shape = model(torch.zeros(inputs)).shape
    for keep_ratio in (0.6, 0.3):
        factorized(model, keep_ratio, optimizers=optimizer)
        assert model(torch.randn(inputs)).shape == shape
        model(torch.randn(inputs)).square().mean().backward()
        optimizer.step()
        held = {id(one) for one in optimizer.param_groups[0]["params"]}
        assert held == {id(one) for one in model.parameters()}
        assert {id(one) for one in optimizer.state} <= held
    assert sum(one.numel() for one in model.parameters()) <= 0.3 * layer.weight.numel()


def test_10_a_model_that_is_itself_a_layer_is_refused_aloud():
    model = nn.Linear(64, 64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Nothing to factorize.*\(the model\): the model itself is this layer"):
        lrc.allocate(model, KEEP)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
