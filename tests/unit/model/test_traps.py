"""Traps: what looks like a layer and is more, or less, is left alone for a reason that is told."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lr_callback as lrc
from lr_callback.model.find import find_layers
from lr_callback.model.traps import around, factor_trap, layer_trap, weight_trap

COMPUTED = "its weight is computed from other parameters (weight_norm, pruning or another parametrization)"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:.*is deprecated")
@pytest.mark.situation("Module tricks", "weight_norm, spectral_norm, parametrizations, pruning masks", "works")
@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        (nn.utils.weight_norm, COMPUTED),
        (nn.utils.spectral_norm, COMPUTED),
        (parametrizations.weight_norm, COMPUTED),
        (parametrizations.orthogonal, COMPUTED),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), COMPUTED),
        (
            lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
            "more than a weight and a bias: bias_orig, bias_mask",
        ),
        (lambda layer: register(layer, "bias"), "ParametrizedLinear is not among the layer types"),
    ],
    ids=["weight norm", "spectral norm", "new weight norm", "orthogonal", "pruned", "pruned bias", "parametrized bias"],
)
def test_weights_that_are_computed_are_left_alone(reasons, trick, reason):
    assert reason in reasons(trick(nn.Linear(32, 32)))["0"]


def register(layer, name):
    parametrize.register_parametrization(layer, name, nn.Identity())
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:.*is deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "parametrization", "prune"])
def test_a_layer_is_one_again_once_the_trick_is_made_permanent(kind):
    layer = nn.Linear(32, 32)
    if kind == "prune":
        prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight")
    elif kind == "parametrization":
        parametrize.remove_parametrizations(parametrizations.weight_norm(layer), "weight")
    else:
        getattr(nn.utils, f"remove_{kind}")(getattr(nn.utils, kind)(layer))
    model = nn.Sequential(layer, nn.Linear(32, 32))
    assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized == ("0", "1")


@pytest.mark.situation("Module tricks", "nn.MultiheadAttention, its subclasses, kdim and vdim", "works")
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [nn.MultiheadAttention, type("Own", (nn.MultiheadAttention,), {})])
def test_attention_and_what_is_in_it_is_left_alone(reasons, kind, options):
    found = reasons(kind(8, 2, **options))
    way_out = "; split_attention_(model) makes layers of it" if kind is nn.MultiheadAttention else ""
    assert found == {
        "0": f"{kind.__name__} is not among the layer types that are factorized{way_out}",
        "0.out_proj": f"read directly by nn.MultiheadAttention{way_out}",
    }


@pytest.mark.situation("Bad input", "a weight that overlaps itself in memory", "refused")
@pytest.mark.parametrize(("steps", "skipped"), [((1, 1), True), ((3, 2), True), ((36, 1), False), ((2, 65), False)])
def test_a_weight_that_overlaps_itself_stays(steps, skipped):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight = nn.Parameter(torch.randn(4000).as_strided((32, 32), steps))
    reason = "its weight is expanded: several of its entries are one number in memory"
    assert find_layers(model).skipped == ({"0": reason} if skipped else {})


@pytest.mark.situation("Module tricks", "lazy layers, nn.LSTM, nn.GRU, nn.Bilinear, ParameterList", "works")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.Bilinear, nn.ParameterList, nn.LazyLinear])
def test_other_types_are_named(kind):
    arguments = {nn.Bilinear: (4, 4, 4), nn.ParameterList: ([torch.ones(2, 2)],), nn.LazyLinear: (4,)}
    reason = find_layers(nn.Sequential(kind(*arguments.get(kind, (4, 4))))).skipped["0"]
    expected = "not initialised yet" if kind is nn.LazyLinear else f"{kind.__name__} is not among the layer types"
    assert expected in reason


def test_a_subclass_is_named_with_its_module_if_it_has_the_name_of_a_known_type(reasons):
    namesake = type("Linear", (nn.Linear,), {"__module__": "somewhere"})
    out_projection = nn.modules.linear.NonDynamicallyQuantizableLinear
    assert "somewhere.Linear is not among" in reasons(namesake(4, 4))["0"]
    assert "NonDynamicallyQuantizableLinear is not among" in reasons(out_projection(4, 4))["0"]


def changed(change):
    layer = nn.Linear(32, 32)
    change(layer)
    return layer


@pytest.mark.situation(
    "Module tricks", "hooks on a state dict or an accumulated gradient, a forward of its own", "works"
)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one.register_state_dict_post_hook(lambda *_: None), "hooks on its state dict"),
        (lambda one: one.register_state_dict_pre_hook(lambda *_: None), "hooks on its state dict"),
        (lambda one: one.register_load_state_dict_pre_hook(lambda *_: None), "hooks on its state dict"),
        (lambda one: one.register_load_state_dict_post_hook(lambda *_: None), "hooks on its state dict"),
        (
            lambda one: one.weight.register_post_accumulate_grad_hook(lambda one: None),
            "hooks on its accumulated gradient",
        ),
        (lambda one: setattr(one, "forward", lambda inputs: inputs), "its forward was replaced on the object"),
        (lambda one: one.register_buffer("scale", torch.ones(1)), "more than a weight and a bias: scale"),
        (lambda one: one.register_parameter("gain", nn.Parameter(torch.ones(1))), "and a bias: gain"),
        (lambda one: one.add_module("adapter", nn.ReLU()), "and a bias: adapter"),
    ],
    ids=range(9),
)
def test_what_a_factorized_layer_could_not_take_over_is_a_reason(reasons, change, reason):
    assert reason in reasons(changed(change))["0"]


def with_bias(layer, bias):
    del layer.bias
    if isinstance(bias, torch.Tensor) and not isinstance(bias, nn.Parameter):
        layer.register_buffer("bias", bias)
    else:
        layer.bias = bias
    return layer


BIASES = [
    (torch.zeros(32), r"a Tensor of shape (32,)"),
    (nn.Parameter(torch.zeros(1)), "a Parameter of shape (1,)"),
    (nn.Parameter(torch.zeros(())), "a Parameter of shape ()"),
    (0.5, "a float"),
]


@pytest.mark.situation("Module tricks", "a bias that is a buffer, a number, or one for all outputs", "works")
@pytest.mark.parametrize(("bias", "found"), BIASES, ids=["buffer", "one entry", "no axis", "number"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 32), lambda: nn.Conv2d(32, 32, 1)], ids=["linear", "conv"])
def test_a_bias_that_is_not_a_parameter_of_each_output_is_a_reason(reasons, make, bias, found):
    layer = with_bias(make(), bias)
    assert reasons(layer)["0"] == f"its bias is {found}, not an nn.Parameter of shape (32,)"
    model, other = (nn.Sequential(nn.Linear(32, 32), copy.deepcopy(layer)) for _ in range(2))
    allocation = lrc.allocate(model, 0.8)
    assert found in allocation.skipped["1"]
    assert lrc.factorize_(model, allocation).factorized == ("0",)
    lrc.restore_(other, model.state_dict())
    assert repr(other) == repr(model)


def test_a_bias_on_an_embedding_which_does_not_add_it_is_a_reason(reasons):
    table = nn.Embedding(64, 32)
    table.bias = nn.Parameter(torch.ones(32))
    assert reasons(table)["0"] == "it holds more than a weight: bias"


@pytest.mark.parametrize(("bias", "found"), BIASES, ids=["buffer", "one entry", "no axis", "number"])
def test_so_it_is_in_a_factorized_layer(bias, found):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    with_bias(model[0].decoder, bias)
    assert find_layers(model).skipped == {"0": f"its bias is {found}, not an nn.Parameter of shape (32,)"}
    lrc.restore_(model, model.state_dict())


def test_a_hook_that_is_removed_is_no_reason_any_more():
    layer = nn.Linear(32, 32)
    layer.weight.register_post_accumulate_grad_hook(lambda one: None).remove()
    layer.register_state_dict_pre_hook(lambda *_: None).remove()
    assert layer_trap(layer) is weight_trap(layer.weight) is None


@pytest.mark.situation("Module tricks", "forward and backward hooks, attributes set on a layer", "works")
def test_attributes_and_hooks_come_along_both_ways():
    model, calls = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(8, 8, 3)), []
    for layer in model:
        layer.mark, layer.weight.no_decay = ["of the user"], True
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: calls.append("back"))
    before = [set(vars(layer)) for layer in model]
    mark = model[0].mark
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert all(isinstance(layer, lrc.FactorizedLinear | lrc.FactorizedConv2d) for layer in model)
    assert model[0].mark is mark
    assert all(one.no_decay for layer in model for one in layer.factors)
    model[0](torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "back"]
    lrc.densify_(model)
    assert [set(vars(layer)) for layer in model] == before
    assert model[0].mark is mark and model[0].weight.no_decay
    model[0](torch.randn(2, 32, requires_grad=True)).sum().backward()
    assert calls == 2 * ["before", "after", "back"]


def holding(weight, requires_grad=False):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return layer


@pytest.mark.situation("Bad input", "meta, empty, expanded, complex, integer and float8 weights", "refused")
@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(4, 4, device="meta"), "its weight is on the meta device and has no values"),
        (torch.ones(0, 4), "its weight is empty, of shape (0, 4)"),
        (torch.ones(4, 0), "its weight is empty, of shape (4, 0)"),
        (torch.randn(4, 1).expand(4, 4), "its weight is expanded"),
        (torch.randn(1).expand(4, 4), "its weight is expanded"),
        (torch.ones(4, 4, dtype=torch.complex64), "of dtype torch.complex64, not floating point of 16, 32 or 64 bits"),
        (torch.ones(4, 4, dtype=torch.int8), "of dtype torch.int8, not floating point"),
        (torch.ones(4, 5), "its weight is of shape (4, 5), which is not what its sizes say"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), "of dtype torch.float8_e4m3fn, not floating point"),
    ],
    ids=["meta", "no outputs", "no inputs", "columns", "scalar", "complex", "int8", "other sizes", "float8"],
)
def test_weights_that_have_no_factors_are_left_alone_and_refused_where_there_is_nothing_else(reasons, weight, reason):
    layer = holding(weight)
    assert reason in reasons(layer)["0"]
    alone, values = nn.Sequential(layer), layer.weight
    with pytest.raises(ValueError, match="Nothing to factorize: ") as refusal:
        lrc.allocate(alone, 0.5)
    assert reason in str(refusal.value)
    assert alone[0] is layer and layer.weight is values


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_convolutions_without_channels_are_left_alone(reasons):
    layer = nn.Conv2d(3, 4, 1)
    layer.weight = nn.Parameter(torch.ones(4, 0, 1, 1))
    assert reasons(layer)["0"] == "its weight is empty, of shape (4, 0, 1, 1)"


@pytest.mark.situation("Bad input", "a model on the meta device", "refused")
def test_a_model_on_the_meta_device_is_refused_by_name(named):
    with torch.device("meta"):
        model = named()
    with pytest.raises(ValueError, match=r"Nothing to factorize: .* first, second: its weight is on the meta device"):
        lrc.allocate(model, 0.5)


@pytest.mark.situation("Bad input", "one layer of many on another device", "works")
def test_one_layer_on_the_meta_device_does_not_stand_in_the_way_of_the_others():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(64, 64)), "away": nn.Linear(8, 8, device="meta")})
    allocation = lrc.allocate(model, 0.6)
    assert allocation.skipped == {"away": "its weight is on the meta device and has no values"}
    assert lrc.factorize_(model, allocation).factorized == ("body.0",)
    assert model["away"].weight.device.type == "meta"
    assert sum(one.numel() for one in model.parameters()) == allocation.cost


@pytest.mark.situation("Module tricks", "weights that are not contiguous, or made in inference mode", "works")
def test_a_weight_that_is_not_contiguous_is_factorized_as_any_other(by_hand):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4, bias=False))
    turned = nn.Sequential(holding(plain[0].weight.detach().t().contiguous().t()))
    assert not turned[0].weight.is_contiguous()
    for model in (plain, turned):
        lrc.factorize_(model, by_hand(model, "0"))
    assert torch.equal(plain[0].weight, turned[0].weight)


@pytest.mark.situation("Module tricks", "weights that are not contiguous, or made in inference mode", "works")
def test_weights_of_inference_mode_are_factorized_and_their_factors_can_be_trained(named):
    torch.manual_seed(0)
    with torch.inference_mode():
        model = named()
        lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert not any(one.is_inference() for layer in (model.first, model.second) for one in layer.factors)
    with torch.inference_mode():
        outputs = model(inputs := torch.randn(2, 32))
        lrc.densify_(model)
        assert torch.allclose(model(inputs), outputs, atol=1e-5)


def test_shared_parts_of_the_reasons():
    assert around(nn.Sequential()) is None
    assert "FSDP" in around(type("FullyShardedDataParallel", (nn.Module,), {})())
    assert weight_trap(nn.Parameter(torch.ones(2, 2))) is None


@pytest.fixture
def factorized(named):
    model = named()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    return model


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("trick", [parametrizations.weight_norm, lambda one: prune.l1_unstructured(one, "weight", 0.5)])
def test_a_factorized_layer_with_a_trick_inside_stays_as_it_is(factorized, part, trick):
    model = factorized
    trick(getattr(model.first, part))
    before = list(model.modules())
    reason = f"the weight of its {part} is computed from other parameters; make it a plain parameter again"
    assert factor_trap(model.first) == find_layers(model).skipped["first"] == reason
    with pytest.raises(ValueError, match=f"^first: it cannot be made dense, {reason}. Nothing was changed"):
        lrc.densify_(model)
    assert list(model.modules()) == before
    allocation = lrc.allocate(model, 0.9)
    assert list(allocation.layers) == ["second"]
    lrc.factorize_(model, allocation)
    assert list(model.first.modules()) == [one for one in before if one in set(model.first.modules())]
