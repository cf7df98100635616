"""The average of a model follows its surgery: nearest to its own weights, in the model's basis."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lr_callback as lrc
from lr_callback.edits.averages import averaged_layers, moved, nearest_decoder, repaired
from lr_callback.edits.surgery import replace_layers
from lr_callback.layers import FactorizedConv2d, FactorizedLinear
from lr_callback.mathematics.folding import FOLDINGS, compose

LAYERS = [
    pytest.param(nn.Linear(12, 7), FactorizedLinear, "kernel_in_encoder", id="Linear"),
    *(pytest.param(nn.Conv2d(12, 7, 3, padding=1), FactorizedConv2d, name, id=name) for name in FOLDINGS),
]


def random_factors(layer, kind, folding, num_slices, rank):
    made = kind(layer, num_slices, rank, folding).double()
    for factor in made.factors:
        nn.init.normal_(factor)
    return made


def solved_by_torch(weight, made, folding):
    """Return the decoder's values by one dense least-squares problem: every entry of the product is one equation."""
    encoder, decoder = (factor.detach() for factor in made.factors)
    columns = []
    for index in range(decoder.numel()):
        unit = torch.zeros_like(decoder).view(-1)
        unit[index] = 1.0
        columns.append(compose(encoder, unit.view_as(decoder), made.num_slices).flatten())
    return torch.linalg.lstsq(torch.stack(columns, 1), weight.flatten(), driver="gelsd").solution.view_as(decoder)


@pytest.mark.parametrize(("layer", "kind", "folding"), LAYERS)
@pytest.mark.parametrize("num_slices", [1, 3])
def test_decoder_is_the_least_squares_solution(layer, kind, folding, num_slices):
    made = random_factors(layer, kind, folding, num_slices, 2)
    weight = torch.randn(layer.weight.shape, dtype=torch.float64)
    found = nearest_decoder(weight, made.factors[0].detach(), folding, num_slices)
    torch.testing.assert_close(found, solved_by_torch(weight, made, folding))


@pytest.mark.parametrize(("layer", "kind", "folding"), LAYERS)
def test_decoder_of_the_models_own_product_is_the_models_decoder(layer, kind, folding):
    made = random_factors(layer, kind, folding, 3, 2)
    encoder, decoder = (factor.detach() for factor in made.factors)
    torch.testing.assert_close(nearest_decoder(made.weight.detach(), encoder, folding, 3), decoder)


@pytest.mark.parametrize(("layer", "kind", "folding"), LAYERS)
def test_an_average_that_equals_the_model_does_so_with_any_factors(layer, kind, folding):
    made = random_factors(layer, kind, folding, 3, 2)
    former = deepcopy(layer).double()
    follower = averaged_layers(nn.Sequential(deepcopy(former)), {"0": former}, {"0": made})["0"]
    assert all(torch.equal(one, other) for one, other in zip(follower.factors, made.factors, strict=True))


def test_what_the_encoder_does_not_determine_is_the_models():
    made = random_factors(nn.Linear(6, 4), FactorizedLinear, "kernel_in_encoder", 1, 3)
    with torch.no_grad():
        made.encoder.weight[2] = 0
    average, former = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    found = averaged_layers(nn.Sequential(average), {"0": former}, {"0": made})["0"].decoder.weight
    assert torch.equal(found[:, 2], made.decoder.weight[:, 2])
    assert not torch.isclose(found[:, :2], made.decoder.weight[:, :2]).any()


def test_what_a_repair_changes_besides_factors_is_named_and_moves_an_average_as_much():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.BatchNorm1d(1, affine=False))
    before = repaired(model, {"0": model[0]})
    statistics = {index: [f"{index}.running_mean", f"{index}.running_var"] for index in (1, 3)}
    assert list(before) == ["0.bias", "1.weight", "1.bias", *statistics[1], *statistics[3]]
    with torch.no_grad():
        model[0].bias += 1
    assert not torch.equal(repaired(model, {"0": model[0]})["0.bias"], before["0.bias"])
    own, former, latter = (torch.tensor([one]) for one in (3.0, 1.0, 0.5))
    assert moved("0.bias", own, former, latter) == moved("1.running_mean", own, former, latter) == 2.5
    assert moved("1.running_var", own, former, latter) == moved("1.weight", own, former, latter) == 1.5
    assert moved("1.running_var", own, 0 * former, latter) == 3, "no factor: it stays"
    assert moved("0.bias", own.half(), former, latter).dtype == torch.half
    zero = torch.zeros(1)
    assert moved("1.running_var", zero, zero, latter, eps=1e-5) == 0.5, "one that equals the model's goes on to do so"
    assert moved("1.running_var", own, zero, torch.tensor([torch.inf]), eps=1e-5) == 3


def networks():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12 * 16, 10))
    average = deepcopy(model)
    with torch.no_grad():
        for value in average.parameters():
            value.add_(0.01 * torch.randn_like(value))
    return model, average


def cut(model, average, keep_ratio):
    """Factorize both; ``None``: multiply the factors of both back."""
    before = {name: model.get_submodule(name) for name in ("0", "3")}
    if keep_ratio is None:
        lrc.densify_(model)
    else:
        lrc.factorize_(model, lrc.allocate(model, keep_ratio))
    made = {name: model.get_submodule(name) for name in before if model.get_submodule(name) is not before[name]}
    replace_layers(average, averaged_layers(average, before, made))


def test_average_has_the_models_encoders_and_its_own_biases_and_statistics():
    model, average = networks()
    own = {name: value.clone() for name, value in average.state_dict().items()}
    bias = average[3].bias
    cut(model, average, 0.4)
    assert average[3].bias is bias
    assert list(average.state_dict()) == list(model.state_dict())
    for name, value in average.state_dict().items():
        if "encoder" in name:
            assert torch.equal(value, model.state_dict()[name])
        elif "decoder.weight" not in name:
            assert torch.equal(value, own[name.replace("decoder.", "")])
    assert not ({id(one) for one in average.parameters()} & {id(one) for one in model.parameters()})


def test_average_is_nearer_to_itself_than_with_the_models_decoder():
    model, average = networks()
    own = average[3].weight.detach().clone()
    cut(model, average, 0.4)
    encoder, decoder = model[3].factors
    error = (average[3].weight - own).norm()
    assert error < (compose(encoder, decoder, model[3].num_slices) - own).norm()


def test_mean_of_the_factors_stays_near_the_mean_of_the_weights():
    # With decompositions of their own the signs alone would make the mean of two encoders meaningless.
    model, average = networks()
    cut(model, average, 0.4)
    mean = compose(*((one + other) / 2 for one, other in zip(model[3].factors, average[3].factors, strict=True)),
                   model[3].num_slices)  # fmt: skip
    torch.testing.assert_close(mean, (model[3].weight + average[3].weight) / 2)


def test_dense_again_and_cut_anew():
    model, average = networks()
    cut(model, average, 0.6)
    cut(model, average, 0.3)
    assert [one.shape for one in average.parameters()] == [one.shape for one in model.parameters()]
    product = average[3].weight.detach().clone()
    cut(model, average, None)
    assert type(average[3]) is nn.Linear
    torch.testing.assert_close(average[3].weight, product)


def test_averaging_goes_on_after_the_surgery():
    model, _ = networks()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    cut(model, averaged.module, 0.4)
    averaged.update_parameters(model)
    assert averaged.n_averaged == 2
    for one, other in zip(averaged.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_average_keeps_its_dtype_and_modes(dtype):
    model, average = networks()
    average = average.to(dtype).eval().requires_grad_(False)
    cut(model, average, 0.4)
    assert {one.dtype for one in average.parameters()} == {dtype}
    assert not any(one.requires_grad for one in average.parameters())
    assert not any(one.training for one in average.modules())
