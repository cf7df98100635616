"""Collect: second moments of what comes into each layer, with the model as it was."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.calibration.collect import collect_moments
from lr_callback.mathematics.importance import Importance


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(128, 5)
    )


def test_moments_are_those_of_the_patches_and_the_model_stays_as_it_was():
    model, batches = network().train(), [torch.randn(40, 3, 4, 4) for _ in range(4)]
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = collect_moments(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), random)
    patches = torch.cat([nn.functional.unfold(one, 3, padding=1).transpose(1, 2).flatten(0, 1) for one in batches])
    assert torch.allclose(found["0"].inputs[0].float(), patches.T @ patches / len(patches), atol=1e-5)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model[:5](one) for one in batches])
    assert torch.allclose(found["5"].inputs[0].float(), features.T @ features / len(features), atol=1e-5)


def test_batches_may_be_tuples_dicts_or_anything_with_a_forward():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, features):
            return self.layer(features)

    model, batch = Named(), torch.randn(9, 3)
    wanted = collect_moments(model, [batch])["layer"].inputs
    for batches, forward in (
        ([(batch, torch.zeros(9))], None),
        ([{"features": batch}], None),
        ([["x", batch]], lambda one: model(features=one[1])),
    ):
        assert torch.equal(collect_moments(model, batches, forward=forward)["layer"].inputs, wanted)


def test_layers_that_are_too_wide_have_moments_of_channels_and_then_mean_squares():
    model, batch = network(), torch.randn(200, 3, 4, 4)
    full = collect_moments(model, [batch])
    part = collect_moments(model, [batch], largest=20)
    assert part["0"].inputs.shape == (1, 3, 3) and part["5"].inputs.shape == (1, 128)
    flat = batch.transpose(0, 1).flatten(1).double()
    assert torch.allclose(part["0"].inputs[0], flat @ flat.T / flat.shape[1], atol=1e-5)
    assert torch.allclose(part["5"].inputs, full["5"].inputs.diagonal(dim1=1, dim2=2), atol=1e-5)
    allocation = lrc.allocate(model, 0.6, method=lrc.ALDS("activation"), importance=part)
    lrc.factorize_(model, allocation, importance=part)
    assert model(batch).shape == (200, 5)


def test_a_layer_that_is_not_called_has_none_and_the_analysis_says_so():
    model = network()
    model.add_module("spare", nn.Module())
    model.spare.layer, model.spare.forward = nn.Linear(30, 30), lambda features: features
    found = collect_moments(model, [torch.randn(200, 3, 4, 4)])
    assert set(found) == {"0", "5"}
    with pytest.warns(UserWarning, match=r"The importance of 1 layer\(s\) is not known.* They are spare.layer\."):
        allocation = lrc.allocate(model, 0.5, method=lrc.ALDS("activation"), importance=found)
    assert allocation.layers["spare.layer"] is not None


def test_few_batches_are_warned_of_and_enough():
    model = network()
    with pytest.warns(
        UserWarning, match=r"few for 1 layer\(s\) \(5\): these have more inputs than positions were seen"
    ):
        found = collect_moments(model, [torch.randn(2, 3, 4, 4)])
    allocation = lrc.allocate(model, 0.5, method=lrc.ALDS("activation"), importance=found)
    lrc.factorize_(model, allocation, importance=found)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_bad_batches_are_refused():
    model = network()
    with pytest.raises(ValueError, match="`batches` must hold at least one calibration batch, got none"):
        collect_moments(model, [])
    bad = torch.randn(4, 3, 4, 4)
    bad[1, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"0: its inputs on the calibration batches cannot be measured.* must be finite"
    ):
        collect_moments(model, [bad])


def test_an_error_that_is_weighted_asks_for_the_importance_and_the_others_refuse_it():
    model, batch = network(), torch.randn(200, 3, 4, 4)
    found = collect_moments(model, [batch])
    with pytest.raises(ValueError, match=r"error='activation' is weighted: `importance` must be .*collect_moments"):
        lrc.allocate(model, 0.5, method=lrc.ALDS("activation"))
    with pytest.raises(ValueError, match="`importance` is for the errors activation, batchnorm, fisher; error='slice'"):
        lrc.allocate(model, 0.5, importance=found)
    allocation = lrc.allocate(model, 0.5, method=lrc.ALDS("activation"), importance=found)
    with pytest.raises(ValueError, match="error='activation' is weighted"):
        lrc.factorize_(model, allocation)
    assert isinstance(model[0], nn.Conv2d)


def test_importance_of_another_layer_or_of_bad_values_is_refused():
    model, batch = network(), torch.randn(200, 3, 4, 4)
    found = collect_moments(model, [batch])
    other = {"0": found["5"], "5": found["5"]}
    with pytest.raises(ValueError, match=r"must be of 1 group\(s\) of 3 or 27 inputs.* got shape \(1, 128, 128\)"):
        lrc.allocate(model, 0.5, method=lrc.ALDS("activation"), importance=other)
    with pytest.raises(ValueError, match=r"one weight for each of the layer's 5 outputs, got 4"):
        wrong = {"5": Importance(outputs=torch.ones(4)), "0": Importance()}
        lrc.allocate(model, 0.5, method=lrc.ALDS("fisher"), importance=wrong)
    for values, text in (
        (torch.ones(3), r"must have the shape \(g, s, s\) or \(g, s\), got \(3,\)"),
        (torch.tensor([[1.0, torch.nan]]), "must be finite mean squares"),
        (torch.tensor([[1.0, -1.0]]), "must be finite mean squares"),
    ):
        with pytest.raises(ValueError, match=f"`importance.inputs` {text}"):
            Importance(inputs=values)
    with pytest.raises(ValueError, match="must be second moments, which are never negative in any direction"):
        indefinite = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]]).repeat(1, 64, 64).double()
        lrc.allocate(
            model, 0.5, method=lrc.ALDS("activation"), importance={"0": Importance(), "5": Importance(indefinite)}
        )


@pytest.mark.parametrize(("value", "scale"), [(3.7, 0.0), (3.7, 1e-6), (1e4, 1e-3), (0.0, 0.0)])
def test_inputs_that_are_constant_or_nearly_so_can_be_cut(value: float, scale: float):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 96)), value + scale * torch.randn(400, 96)
    before = model(inputs)
    found = collect_moments(model, [inputs])
    allocation = lrc.allocate(model, 0.5, method=lrc.ALDS("activation"), importance=found)
    report = lrc.factorize_(model, allocation, importance=found)
    lrc.correct_biases_(model, report.replaced, found, [inputs])
    assert torch.allclose(model(inputs), before, rtol=1e-3, atol=1e-3 * float(before.detach().abs().max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-19, 1e-23, 1e-40])
def test_inputs_that_are_too_small_to_square_can_be_cut(seed, scale):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    moments = collect_moments(model, [torch.randn(40, 16) * scale])
    for shrinkage in (0, 0.5):
        method = lrc.ALDS("activation", shrinkage=shrinkage)
        allocation = lrc.allocate(model, 0.6, method=method, importance=moments)
        assert allocation.factorized and allocation.worst_error <= 1


def test_inputs_that_are_large_and_hardly_vary_are_weighed_by_how_they_vary():
    torch.manual_seed(0)
    layer = nn.Linear(96, 200)
    inputs = 50 + 0.1 * torch.randn(40, 96)  # fewer than columns: what rounding leaves may be negative
    with pytest.warns(UserWarning, match="calibration batches are few"):
        found = collect_moments(nn.Sequential(layer), [inputs])
    allocation = lrc.allocate(nn.Sequential(layer), 0.5, method=lrc.ALDS("activation", max_slices=1), importance=found)
    rank = allocation.layers["0"].rank
    outputs = (inputs - inputs.mean(0)).double() @ layer.weight.detach().double().T
    energy = torch.linalg.svdvals(outputs).square()
    assert allocation.layers["0"].relative_error == pytest.approx(
        float(energy[rank:].sum() / energy.sum()) ** 0.5, rel=1e-3, abs=1e-4
    )
