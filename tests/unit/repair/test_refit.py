"""Refit: each decoder is the least-squares solution, and nothing but decoders and their biases changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.repair.refit import refit_

KINDS = {
    "linear": (lambda: nn.Linear(24, 20), (300, 24)),
    "without a bias": (lambda: nn.Linear(24, 20, bias=False), (300, 24)),
    "leading dimensions": (lambda: nn.Linear(24, 20), (20, 15, 24)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (20, 8, 9, 9)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (20, 8, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2), (10, 8, 5, 5)),
    "three axes": (lambda: nn.Conv3d(6, 8, 2), (8, 6, 4, 4, 4)),
}


def cut(layer, folding="kernel_in_encoder", num_slices=1, rank=3):
    from lr_callback.layers.layer_types import layer_type

    model = nn.Sequential(layer)
    shape = layer_type(layer).geometry(layer).weight_shape
    choice = lrc.Factorization(folding, num_slices, rank, 0.0, 0, 1)
    return model, lrc.factorize_(model, lrc.Allocation({"0": choice}, {}, {"0": shape}, 0, 1, 0, 1.0))


def squared(model, teacher, inputs):
    with torch.no_grad():
        return (model(inputs) - teacher(inputs)).double().square().sum().item()


@pytest.mark.parametrize("factors", ["both", "decoder"])
@pytest.mark.parametrize("inputs", ["cut", "dense"])
@pytest.mark.parametrize("folding", ["kernel_in_encoder", "height_in_decoder", "kernel_in_decoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_decoder_is_closer(kind, folding, inputs, factors):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer, batch = make(), torch.randn(*shape)
    model, report = cut(layer, folding, 2, rank=1 if folding == "kernel_in_decoder" else 3)
    before, bias = squared(model, layer, batch), None if layer.bias is None else layer.bias.detach().clone()
    teacher = {"0": layer}
    wanted = layer(batch).detach()
    left = refit_(model, report.replaced, [batch], inputs=inputs, factors=factors)
    assert report.replaced == teacher and (bias is None or not torch.equal(bias, model[0].bias))

    def lost():
        return (model(batch) - wanted).double().square().sum()

    after = lost()
    assert after < before and left["0"] == pytest.approx(after.item() / before, abs=1e-4)
    trained = [model[0].decoder.weight, *([] if bias is None else [model[0].bias])]
    gradients = torch.autograd.grad(after, trained)
    scale = torch.autograd.grad((model(batch)).double().square().sum(), trained)
    for gradient, size in zip(gradients, scale, strict=True):
        assert gradient.norm() < 1e-3 * size.norm()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


BATCHES = [torch.randn(80, 3, 4, 4, generator=torch.Generator().manual_seed(one)) for one in range(8)]


def factorized():
    model = network().eval()
    wanted = torch.cat([model(one) for one in BATCHES]).detach()
    report = lrc.factorize_(model, lrc.allocate(model, 0.3))
    return model, report, wanted


def off(model, wanted):
    with torch.no_grad():
        return (torch.cat([model(one) for one in BATCHES]) - wanted).norm().item()


def test_layer_after_layer_on_cut_inputs_is_closer_than_on_dense_ones_and_that_than_none():
    found = {}
    for how in ("none", "dense", "cut"):
        model, report, wanted = factorized()
        if how != "none":
            refit_(model, report.replaced, BATCHES, inputs=how)
        found[how] = off(model, wanted)
    assert found["cut"] < found["dense"] < found["none"]


@pytest.mark.parametrize("factors", ["both", "decoder"])
def test_only_factors_change_and_nothing_is_left_behind(factors):
    model, report, _ = factorized()
    model.train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    parameters = dict(model.named_parameters())
    refit_(model, report.replaced, BATCHES, factors=factors)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = ["decoder.weight", "decoder.bias", *(["encoder.weight"] if factors == "both" else [])]
    assert changed == {f"{name}.{part}" for name in report.factorized for part in parts}
    assert dict(model.named_parameters()) == parameters and all(one.requires_grad for one in parameters.values())
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert not any(layer._forward_hooks for layer in [*model.modules(), *report.replaced.values()])
    assert all(report.replaced[name].bias is model.get_submodule(name).bias for name in report.factorized)


@pytest.mark.parametrize("num_slices", [1, 2, 4])
@pytest.mark.parametrize("kind", ["linear", "without a bias", "convolution", "groups", "transposed"])
def test_both_factors_are_closer_than_the_decoder_alone(kind, num_slices):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer, batch = make(), torch.randn(*shape) * torch.rand(shape[1]).reshape(-1, *[1] * (len(shape) - 2)) ** 2
    wanted = layer(batch).detach()
    off = {}
    for factors in ("decoder", "both"):
        again = copy.deepcopy(layer)
        rank = min(3, 4 // num_slices if kind in ("groups", "transposed") else 3)
        model, report = cut(again, num_slices=num_slices if shape[1] % num_slices == 0 else 1, rank=rank)
        refit_(model, report.replaced, [batch], factors=factors)
        off[factors] = (model(batch) - wanted).norm().item()
    assert off["both"] < off["decoder"] * (1 + 1e-6)


def test_one_slice_has_the_principal_components_of_its_outputs():
    """The best rank-j map of a layer's inputs to its outputs, found the slow way."""
    torch.manual_seed(0)
    layer, batch = nn.Linear(12, 9).double(), torch.randn(400, 12, dtype=torch.float64) ** 3
    outputs = layer(batch).detach()
    model, report = cut(layer, rank=4)
    refit_(model, report.replaced, [batch])
    centered = outputs - outputs.mean(0)
    tail = torch.linalg.svdvals(centered)[4:].square().sum().sqrt()
    assert (model(batch) - outputs).norm().item() == pytest.approx(tail.item(), rel=1e-4)


def test_a_layer_that_is_used_twice_is_fitted_to_both_uses():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, features):
            return self.layer(torch.relu(self.layer(features)) * 3)

    model, batch = Twice().eval(), torch.randn(300, 16)
    wanted = model(batch).detach()
    report = lrc.factorize_(model, lrc.allocate(model, 0.6))
    before = (model(batch) - wanted).norm()
    assert 0 < refit_(model, report.replaced, [batch])["layer"] < 1
    assert (model(batch) - wanted).norm() < before


def test_an_embedding_is_refitted_through_its_decoder():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16))
    tokens = torch.randint(40, (30, 9))
    report = lrc.factorize_(model, lrc.allocate(model, 0.5, embeddings=True))
    assert "0" in refit_(model, report.replaced, [tokens])


def test_directions_that_were_not_seen_keep_their_decoder():
    torch.manual_seed(0)
    layer = nn.Linear(24, 20)
    model, report = cut(layer, rank=6)
    before = model[0].decoder.weight.detach().clone()
    batch = torch.randn(3, 24)  # fewer inputs than the encoder has outputs
    wanted = layer(batch).detach()
    with pytest.warns(UserWarning, match=r"few for 1 layer\(s\) \(0\): it is fitted to less than two positions"):
        refit_(model, report.replaced, [batch], factors="decoder")
    assert torch.allclose(model(batch), wanted, atol=1e-4)
    through = model[0].encoder(batch)
    centered = (through - through.mean(0)).T
    unseen = torch.linalg.svd(centered).U[:, 2:]
    assert torch.allclose(model[0].decoder.weight @ unseen, before @ unseen, atol=1e-4)


def test_a_layer_that_is_not_called_is_told_of_and_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Module())
    model[1].spare, model[1].forward = nn.Linear(16, 16), lambda features: features
    report = lrc.factorize_(model, lrc.allocate(model, 0.6))
    before = model[1].spare.decoder.weight.clone()
    with pytest.warns(UserWarning, match=r"1 layer\(s\) are not called on the first calibration batch.*: 1.spare\."):
        assert set(refit_(model, report.replaced, [torch.randn(90, 16)])) == {"0"}
    assert torch.equal(model[1].spare.decoder.weight, before)


@pytest.mark.parametrize("inputs", ["cut", "dense"])
def test_a_failure_puts_all_decoders_back(inputs):
    model, report, _ = factorized()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = BATCHES[0].clone()
    bad[3] = torch.inf
    with pytest.raises(ValueError, match=r"its outputs on the calibration batches cannot be compared.* must be finite"):
        refit_(model, report.replaced, [BATCHES[0], bad], inputs=inputs)
    with pytest.raises(ValueError, match="at least one calibration batch, got none"):
        refit_(model, report.replaced, [], inputs=inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(isinstance(model.get_submodule(name), nn.Module) for name in report.factorized)
    with pytest.raises(ValueError, match="`inputs` must be 'cut' or 'dense', got 'both'"):
        refit_(model, report.replaced, BATCHES, inputs="both")
    with pytest.raises(ValueError, match="`factors` must be 'both' or 'decoder', got 'encoder'"):
        refit_(model, report.replaced, BATCHES, factors="encoder")


@pytest.mark.parametrize(("frozen", "times"), [(False, 4), (True, 2)])
def test_each_batch_runs_through_the_model_a_few_times_and_some_to_see_how_it_runs(frozen, times):
    model, report, _ = factorized()
    for norm in [one for one in model.train().modules() if isinstance(one, nn.BatchNorm2d) and frozen]:
        norm.eval()
    runs = []
    model[2].register_forward_hook(lambda *_: runs.append(1))
    refit_(model, report.replaced, BATCHES)
    # Once before and once after it for BatchNorm; the order of the layers, and twice two runs: alone and together.
    assert len(runs) == times * len(BATCHES) + 5


def test_a_model_whose_way_depends_on_its_inputs_is_refitted_where_it_goes():
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, features):
            layer = self.first if features.mean() > 0 else self.second
            return self.last(torch.relu(layer(features)))

    model = Branches()
    batches = [torch.randn(200, 16) + 0.5, torch.randn(200, 16) - 0.5, torch.randn(200, 16) + 0.5]
    wanted = [model(batch).detach() for batch in batches]
    report = lrc.factorize_(model, lrc.allocate(model, 0.6))
    before = [(model(batch) - one).norm().item() for batch, one in zip(batches, wanted, strict=True)]
    with pytest.warns(UserWarning, match=r"not called on the first calibration batch.* second"):
        left = refit_(model, report.replaced, batches)
    assert set(left) == {"first", "last"}
    after = [(model(batch) - one).norm().item() for batch, one in zip(batches, wanted, strict=True)]
    assert after[0] < before[0] and after[2] < before[2]


def without_biases():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    )
    batches = [torch.rand(8, 3, 9, 9) + 1 for _ in range(4)]
    lrc.recalibrate_batchnorm_(model, batches)
    return model.eval(), batches


def gain(norm: nn.BatchNorm2d) -> torch.Tensor:
    return norm.weight.detach() / (norm.running_var + norm.eps).sqrt()


@pytest.mark.parametrize("inputs", ["cut", "dense"])
@pytest.mark.parametrize("factors", ["both", "decoder"])
def test_the_batchnorm_after_a_layer_takes_up_its_mean(inputs, factors):
    model, batches = without_biases()
    teacher = copy.deepcopy(model)
    report = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.4))
    left = refit_(model, report.replaced, batches, inputs=inputs, factors=factors)
    for index in (1, 4):
        assert torch.allclose(gain(model[index]), gain(teacher[index]), rtol=1e-5), "it multiplies with what it did"
        assert model[index].running_var.mean() < teacher[index].running_var.mean()
    everything = torch.cat(batches)
    with torch.no_grad():
        wanted, built = teacher[:2](everything), model[:2](everything)
        assert left["0"] < 1 and not torch.allclose(wanted, built, atol=1e-3)
        # On the very inputs of the fit the mean of what the BatchNorm gives is that of before, channel by channel.
        torch.testing.assert_close(built.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
        if inputs == "cut":
            torch.testing.assert_close(
                model(everything).mean((0, 2, 3)), teacher(everything).mean((0, 2, 3)), atol=1e-4, rtol=1e-4
            )


def test_a_frozen_batchnorm_and_one_that_keeps_no_mean_take_up_nothing():
    model, batches = without_biases()
    model.train()[1].eval()
    model[4] = nn.BatchNorm2d(8, track_running_stats=False)
    report, mean = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.4)), model[1].running_mean.clone()
    refit_(model, report.replaced, batches)
    assert torch.equal(model[1].running_mean, mean) and model[4].running_mean is None


def test_a_failure_leaves_the_means_of_batchnorm_as_they_were():
    model, batches = without_biases()
    report = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be compared"):
        refit_(model, report.replaced, [*batches, batches[0] * torch.nan])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Keeps(nn.Module):
    """Layers with shortcuts, whose inputs are kept as an attribute meanwhile, or not."""

    def __init__(self, on_itself):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.on_itself = nn.ModuleList(nn.Linear(24, 24) for _ in range(4)), on_itself

    def forward(self, inputs):
        for layer in self.layers:
            self.kept = kept = inputs
            inputs = torch.relu(layer(inputs))
            inputs = inputs + (self.kept if self.on_itself else kept)
        return inputs


def test_a_model_whose_runs_mix_is_refitted_to_the_inputs_before_the_cut():
    batches = [torch.randn(64, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    ends = {}
    for on_itself, inputs, gentle in ((True, "cut", True), (True, "cut", False), (True, "dense", False), (False,) * 3):
        model = Keeps(on_itself)
        report = lrc.factorize_(model, lrc.allocate(model, 0.5))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refit_(model, report.replaced, batches, inputs=inputs or "cut", gentle=gentle)
        told = [str(one.message) for one in caught if "where another run finds it" in str(one.message)]
        assert len(told) == (on_itself and inputs == "cut" and not gentle)
        ends[on_itself, inputs, gentle] = model(batches[0])
    mixed, told, dense, alone = ends.values()
    assert torch.equal(mixed, dense) and torch.equal(told, dense) and not torch.equal(alone, dense)


@pytest.mark.parametrize("factors", ["both", "decoder"])
@pytest.mark.parametrize("inputs", ["cut", "dense"])
def test_of_few_positions_a_gentle_refit_changes_the_mean_alone(inputs, factors):
    torch.manual_seed(0)
    layer, batch = nn.Linear(48, 20), torch.randn(5, 48) + 1
    model, report = cut(layer, num_slices=2, rank=4)
    wanted, kept = layer(batch).mean(0), [factor.clone() for factor in model[0].factors]
    assert (model(batch).mean(0) - wanted).norm() > 0.1
    assert refit_(model, report.replaced, [batch], inputs=inputs, factors=factors, gentle=True) == {}
    assert torch.allclose(model(batch).mean(0), wanted, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(model[0].factors, kept, strict=True))


def test_of_few_positions_the_batchnorm_takes_up_the_change_of_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 20, bias=False), nn.BatchNorm1d(20)).eval()
    batch = torch.randn(5, 48) + 1
    wanted = model(batch).mean(0)
    choice = lrc.Factorization("kernel_in_encoder", 1, 4, 0.0, 0, 1)
    report = lrc.factorize_(model, lrc.Allocation({"0": choice}, {}, {"0": (20, 48)}, 0, 1, 0, 1.0))
    assert refit_(model, report.replaced, [batch], gentle=True) == {}
    assert torch.allclose(model(batch).mean(0), wanted, atol=1e-5)


def test_a_decoder_is_refitted_under_autocast():
    torch.manual_seed(0)
    model, report = cut(nn.ConvTranspose2d(8, 12, 3), num_slices=2)
    model, batch = nn.Sequential(nn.Conv2d(3, 8, 1), *model), torch.randn(20, 3, 6, 6)

    def forward(images):
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    assert refit_(model, {"1": report.replaced["0"]}, [batch], forward=forward)["1"] < 1


@pytest.mark.parametrize("factors", ["both", "decoder"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_biases_stay_if_they_may_not_change_and_the_factors_are_the_best_without(kind, factors):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer, batch = make(), torch.randn(*shape) + 1
    model, report = cut(layer, num_slices=2)
    bias, wanted = layer.bias.detach().clone(), layer(batch).detach()
    before = squared(model, layer, batch)
    left = refit_(model, report.replaced, [batch], factors=factors, biases=False)
    assert torch.equal(model[0].bias, bias)
    after = (model(batch) - wanted).double().square().sum()
    assert left["0"] == pytest.approx(after.item() / before, abs=1e-4)
    gradient, scale = (
        torch.autograd.grad(one, model[0].decoder.weight)[0] for one in (after, model(batch).double().square().sum())
    )
    assert gradient.norm() < 1e-3 * scale.norm()
    again, report = cut(layer, num_slices=2)
    refit_(again, report.replaced, [batch], factors=factors)
    with torch.no_grad():
        assert (again(batch) - wanted).double().square().sum() < after
