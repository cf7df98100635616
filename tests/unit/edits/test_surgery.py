"""Surgery: layers are replaced as an allocation says, or nothing is."""

import copy
import json

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import lr_callback as lrc
from lr_callback.common.parallel import workers
from lr_callback.edits.build import check_allocation, dense_skeleton, factors, skeleton
from lr_callback.edits.surgery import replace_layers
from lr_callback.mathematics.folding import Geometry


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 32), nn.Linear(32, 8)
    ).to(dtype)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def choice(rank=2, num_slices=1, folding="kernel_in_encoder"):
    return lrc.Factorization(folding, num_slices, rank, 0.0, 0, 1)


def allocation_of(model, **layers):
    """Return an allocation by hand; names with an underscore for the dot."""
    named = {name.removeprefix("_").replace("_", "."): one for name, one in layers.items()}
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in named}
    return lrc.Allocation(named, {}, shapes, 0, 1, 0, 1.0)


def test_the_report_says_what_was_done():
    model = network()
    report = lrc.factorize_(model, allocation_of(model, _0=choice(), _3=choice(), _4=None))
    assert report.factorized == ("0", "3")
    assert report.densified == report.unchanged == ()
    assert report.parameters_before == sum(one.numel() for one in network().parameters())
    assert report.parameters_after == sum(one.numel() for one in model.parameters())
    assert [len(new) for new in report.replacements.values()] == [2, 2]
    changed = lrc.factorize_(model, allocation_of(model, _0=choice(), _3=None, _4=choice()))
    assert (changed.factorized, changed.densified, changed.unchanged) == (("4",), ("3",), ("0",))
    assert lrc.densify_(model).densified == ("0", "4")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_in_other_precisions_the_factors_are_those_of_float64_but_for_rounding(dtype, tolerance):
    model = network(dtype)
    exact = copy.deepcopy(model).double()
    allocation = allocation_of(model, _0=choice(4, 3), _3=choice(5, 4), _4=choice(6))
    for one in (model, exact):
        assert lrc.factorize_(one, allocation).factorized == ("0", "3", "4")
    for name in ("0", "3", "4"):
        found, wanted = model.get_submodule(name).weight.detach().double(), exact.get_submodule(name).weight.detach()
        assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_another_rank_is_made_from_the_product_not_from_the_factors():
    model = network(torch.float64)
    lrc.factorize_(model, allocation_of(model, _3=choice(16)))
    product = model[3].weight.detach().clone()
    lrc.factorize_(model, allocation_of(model, _3=choice(4)))
    left, values, right = torch.linalg.svd(product)
    assert torch.allclose(model[3].weight, (left[:, :4] * values[:4]) @ right[:4], atol=1e-10)


def test_the_factors_are_balanced():
    model = network(torch.float64)
    lrc.factorize_(model, allocation_of(model, _3=choice(4)))
    encoder, decoder = model[3].factors
    assert torch.allclose(encoder.norm(dim=1), decoder.norm(dim=0))


def test_the_bias_stays_the_same_parameter():
    model = network()
    bias = model[3].bias
    lrc.factorize_(model, allocation_of(model, _3=choice()))
    assert model[3].bias is model[3].decoder.bias is bias
    lrc.densify_(model)
    assert model[3].bias is bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_slices": 5}, r"3: `num_slices` must divide the 256 input channels, got 5"),
        ({"rank": 33}, r"3: `rank` must be at most 32, the smaller side of a slice, got 33"),
        ({"rank": 3, "num_slices": 128}, r"3: `rank` must be at most 2"),
    ],
)
def test_a_structure_that_the_layer_cannot_have_is_refused(change, message):
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=f"{message}.*Nothing was changed"):
        lrc.factorize_(model, allocation_of(model, _0=choice(), _3=choice(**change)))
    assert same(state(model), before)


def test_an_allocation_of_another_model_is_refused_with_both_sides_named():
    model, other = network(), nn.ModuleDict({"body": nn.Linear(8, 8)})
    before = state(model)
    with pytest.raises(
        ValueError, match=r"of another model: it names body, this model has 0, 3, 4. Nothing was changed"
    ):
        lrc.factorize_(model, allocation_of(other, body=choice()))
    assert same(state(model), before)
    with pytest.raises(ValueError, match="this model has no layer that can be factorized"):
        lrc.factorize_(nn.ReLU(), allocation_of(other, body=choice()))


def test_an_allocation_for_another_shape_is_refused():
    model = network()
    before = state(model)
    allocation = allocation_of(nn.ModuleDict({"3": nn.Linear(256, 31), "0": nn.Conv2d(3, 16, 3)}), _0=choice(), _3=None)
    with pytest.raises(
        ValueError, match=r"3: the allocation is for a weight of shape \(31, 256\), this model's is \(32, 256\)"
    ):
        lrc.factorize_(model, allocation)
    assert same(state(model), before)


@pytest.mark.parametrize("wrong", [0.5, None, {"version": 1}, "allocation.json"], ids=repr)
def test_what_is_no_allocation_is_refused(wrong):
    with pytest.raises(TypeError, match=rf"`allocation` must be an Allocation, got {type(wrong).__name__}"):
        lrc.factorize_(network(), wrong)


def test_a_layer_that_was_pruned_since_the_allocation_is_refused():
    model = network()
    allocation = allocation_of(model, _3=choice())
    prune.l1_unstructured(model[3], "weight", 0.5)
    before = state(model)
    with pytest.raises(ValueError, match="it names 3, this model has 0, 4"):
        lrc.factorize_(model, allocation)
    assert same(state(model), before)


def refused(source, message):
    """Check that a written allocation is refused and that every bit and object of the model is as before."""
    model = network()
    before, modules = state(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        lrc.restore_(model, source)
    assert list(model.modules()) == modules
    assert same(state(model), before)


@pytest.mark.parametrize("cut", [0.3, 0.99])
@pytest.mark.parametrize("as_text", [True, False])
def test_an_allocation_that_was_cut_off_is_refused(cut, as_text, tmp_path):
    text = lrc.allocate(network(), 0.5).to_json()
    path = tmp_path / "allocation.json"
    path.write_text(text[: int(cut * len(text))], encoding="utf-8")
    where = "Allocation text" if as_text else "Allocation file 'allocation.json'"
    source = path.read_text(encoding="utf-8") if as_text else path
    refused(source, rf"{where}: must be JSON, broken at line \d+, column \d+ .*it may be cut off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "package", "dependencies": {}}', "must be a dict with the keys that `Allocation.to_dict"),
        ('{"version": 1, "name": "x"}', "`layers` is missing.*damaged or foreign"),
        ('{"version": 2, "layers": {}}', "version 2 is newer than 1.*update lr_callback"),
        ('{"version": "1", "layers": {}}', "`version` must be a whole number"),
        ("{}", "must be a dict with the keys"),
    ],
)
def test_foreign_and_newer_json_is_refused(text, message):
    refused(text, message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["layers"], [], "`layers` must be dict, got list"),
        (["cost"], "12", "`cost` must be int, got str '12'"),
        (["cost"], True, "`cost` must be int, got bool"),
        (["keep_ratio"], None, "`keep_ratio` must be int or float, got NoneType"),
        (["layers", "3"], 5, "layer '3': must be a dict or null, got int '5'"),
        (["layers", "3", "rank"], 2.0, "layer '3': `rank` must be int, got float"),
        (["layers", "3", "rank"], 0, "`num_slices` and `rank` must be at least 1"),
        (["layers", "3", "folding"], "origami", "`folding` must be one of"),
        (["layers", "3", "rank"], 999, "3: `rank` must be at most"),
        (["layers", "9"], None, "`shapes` must name the same layers"),
        (["shapes", "3"], [32, 255], r"3: the allocation is for a weight of shape \(32, 255\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_allocation_is_refused_with_the_place(path, value, message):
    written = json.loads(lrc.allocate(network(), 0.5).to_json())
    inner = written
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    refused(written, message)
    refused(json.dumps(written), message)


@pytest.mark.parametrize("layer", [lrc.FactorizedLinear(nn.Linear(8, 8), 1, 2)])
def test_densify_refuses_a_model_that_is_a_factorized_layer_itself(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"`model` is a factorized layer itself.*to_dense"):
        lrc.densify_(layer, optimizers=optimizer)
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], held, strict=True))


def test_densify_of_a_dense_model_does_nothing():
    model = network()
    modules = list(model.modules())
    report = lrc.densify_(model)
    assert report.densified == report.factorized == ()
    assert list(model.modules()) == modules


def test_check_allocation_returns_the_named_layers():
    model = network()
    assert check_allocation(model, allocation_of(model, _3=choice(), _4=None)) == {"3": model[3], "4": model[4]}


def test_factors_multiply_to_the_nearest_weight_of_that_rank():
    weight = torch.randn(6, 8, dtype=torch.float64)
    with workers() as crew:
        encoder, decoder = factors(weight, Geometry(6, 8), choice(6), crew)
        assert torch.allclose(decoder @ encoder, weight)
        encoder, decoder = factors(weight, Geometry(6, 8), choice(2), crew)
    error = torch.linalg.matrix_norm(weight - decoder @ encoder, 2)
    assert torch.allclose(error, torch.linalg.svdvals(weight)[2])


def test_skeletons_take_over_bias_mode_and_hooks():
    layer = nn.Linear(8, 4).eval()
    handle = layer.register_forward_hook(lambda *_: None)
    made = skeleton(layer, choice(2, 4))
    back = dense_skeleton(made)
    for one in (made, back):
        assert one.bias is layer.bias
        assert not one.training
        assert len(one._forward_hooks) == 1
    handle.remove()
    assert not made._forward_hooks
    assert not back._forward_hooks


def test_replace_layers_swaps_a_layer_under_all_of_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    new = skeleton(shared, choice(1))
    replace_layers(model, {"one": new})
    assert model["one"] is model["two"][0] is new


def test_a_transformer_layer_runs_the_same_with_and_without_the_fused_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    report = lrc.factorize_(model, lrc.allocate(model, 0.8))
    assert report.factorized
    inputs = torch.randn(2, 5, 32)
    with torch.no_grad():
        fused = model.eval()(inputs)
    plain = model(inputs.requires_grad_())
    assert torch.allclose(fused, plain, atol=1e-5)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).eval()


def test_a_resnet18_is_compressed_to_the_budget_and_runs(resnet):
    model = copy.deepcopy(resnet)
    allocation = lrc.allocate(model, 0.97, method=lrc.ALDS(max_slices=2), exclude="layer[34]*")
    report = lrc.factorize_(model, allocation)
    assert report.parameters_after == allocation.cost <= 0.97 * report.parameters_before
    assert len(report.factorized) >= 5
    outputs = model(torch.randn(2, 3, 32, 32))
    assert outputs.shape == (2, 10)
    assert bool(outputs.isfinite().all())
    model.train()
    outputs = model(torch.randn(2, 3, 32, 32))
    outputs.square().mean().backward()
    assert all(one.grad is not None for one in model.parameters())
