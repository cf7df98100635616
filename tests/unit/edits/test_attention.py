"""split_attention_: what is taken over, what is left alone, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import lr_callback as lrc
from lr_callback.layers.attention import SplitAttention


def attention(**options):
    return nn.MultiheadAttention(8, 2, **options)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}, {"add_bias_kv": True}], ids=str)
def test_weights_and_what_is_set_on_them_are_taken_over(options):
    dense = attention(dtype=torch.float64, **options).eval()
    dense.out_proj.weight.requires_grad_(False)
    for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        parameter = getattr(dense, name)
        if parameter is not None:
            parameter.requires_grad_(name != "in_proj_bias")._mark = name
    dense.tag = "mine"
    model = nn.Sequential(nn.Linear(8, 8), dense)
    assert lrc.split_attention_(model) == ("1",)
    split = model[1]
    assert type(split) is SplitAttention and not split.training and not split.q_proj.training and split.tag == "mine"
    assert split.out_proj.weight is dense.out_proj.weight and split.out_proj.bias is dense.out_proj.bias
    assert split.bias_k is dense.bias_k and split.bias_v is dense.bias_v
    for number, part in enumerate("qkv"):
        layer, whole = split.get_submodule(f"{part}_proj"), getattr(dense, f"{part}_proj_weight")
        assert type(layer) is nn.Linear
        if whole is None:
            assert layer.weight.untyped_storage().data_ptr() != dense.in_proj_weight.untyped_storage().data_ptr()
            assert torch.equal(layer.weight, dense.in_proj_weight.chunk(3)[number])
            assert layer.weight.requires_grad and layer.weight._mark == "in_proj_weight"
        else:
            assert layer.weight is whole
        if dense.in_proj_bias is None:
            assert layer.bias is None
        else:
            assert torch.equal(layer.bias, dense.in_proj_bias.chunk(3)[number])
            assert not layer.bias.requires_grad and layer.bias._mark == "in_proj_bias"
    assert all(parameter.dtype == torch.float64 for parameter in split.parameters())


def test_on_the_meta_device_and_of_inference_tensors():
    model = nn.Sequential(attention(device="meta"))
    lrc.split_attention_(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.inference_mode():
        model = nn.Sequential(attention())
        lrc.split_attention_(model)
    assert not model[0].q_proj.weight.is_inference()


def test_one_at_two_places_stays_one_and_a_second_call_finds_none():
    shared, model = attention(), nn.ModuleDict()
    model["first"], model["others"] = shared, nn.ModuleList([attention(), shared])
    assert lrc.split_attention_(model) == ("first", "others.0")
    assert model["first"] is model["others"][1] is not model["others"][0]
    assert lrc.split_attention_(model) == ()
    assert not any(isinstance(one, nn.MultiheadAttention) for one in model.modules())


def test_hooks_follow_and_their_handles_still_remove_them():
    model, seen, words = nn.Sequential(attention()), [], torch.randn(3, 2, 8, requires_grad=True)
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: seen.append("before")),
        model[0].register_forward_hook(lambda module, args, outputs: seen.append("after")),
        model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
    ]
    lrc.split_attention_(model)
    model[0](words, words, words)[0].sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model[0](words, words, words)[0].sum().backward()
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_subclasses_are_left():
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(8, 2)
    model = nn.Sequential(quantizable, type("Own", (nn.MultiheadAttention,), {})(8, 2), attention())
    before = list(model)
    assert lrc.split_attention_(model) == ("2",)
    assert [model[0], model[1]] == before[:2]


def test_a_model_that_is_attention_itself_is_refused():
    with pytest.raises(ValueError, match=r"`model` is an nn.MultiheadAttention itself.*take `SplitAttention"):
        lrc.split_attention_(attention())


def changed(change):
    dense = attention()
    change(dense)
    return dense


def tied(dense):
    dense.register_module("other", nn.Linear(8, 24))
    dense.other.weight = dense.in_proj_weight


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: parametrize.register_parametrization(one, "in_proj_weight", nn.Identity()), "parametrization"),
        (lambda one: parametrize.register_parametrization(one.out_proj, "weight", nn.Identity()), "parametrization"),
        (lambda one: nn.utils.weight_norm(one, "in_proj_weight"), "more than its own weights: in_proj_weight_g"),
        (lambda one: prune.l1_unstructured(one, "in_proj_bias", 0.5), "more than its own weights: in_proj_bi"),
        (lambda one: nn.utils.weight_norm(one.out_proj), "of its out_proj: it holds more than a weight and a bias"),
        (lambda one: one.register_buffer("scale", torch.ones(1)), "more than its own weights: scale"),
        (lambda one: setattr(one, "out_proj", nn.Sequential()), "its out_proj is a Sequential"),
        (lambda one: setattr(one, "forward", one.forward), "its forward was replaced on the object itself"),
        (lambda one: setattr(one.out_proj, "forward", print), "of its out_proj: its forward was replaced"),
        (lambda one: one.register_state_dict_post_hook(lambda *_: None), "hooks on its state dict"),
        (lambda one: one.out_proj.register_load_state_dict_pre_hook(lambda *_: None), "of its out_proj: it has hooks"),
        (lambda one: one.in_proj_weight.register_hook(print), "its in_proj_weight has hooks on its gradient"),
        (lambda one: one.in_proj_bias.register_post_accumulate_grad_hook(print), "its in_proj_bias has hooks on its"),
        (lambda one: setattr(one.in_proj_weight, "grad", one.in_proj_weight.detach()), "split before the training"),
        (lambda one: setattr(one.in_proj_weight, "owner", object()), "cannot be copied: owner; set them afterwards"),
        (lambda one: one.compile(), "it is compiled on its own"),
    ],
)
def test_what_would_be_lost_is_refused_by_name_and_nothing_is_changed(change, reason):
    model = nn.Sequential(attention(), nn.ModuleDict({"inner": changed(change)}))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"1.inner: it cannot be split, .*{reason}.*Nothing was changed"):
        lrc.split_attention_(model)
    assert dict(model.named_modules()) == before
    assert lrc.split_attention_(nn.ModuleList([model[0]])) == ("0",)


def test_what_others_hold_too_is_refused():
    for change, reason in [
        (lambda model: setattr(model[1], "in_proj_weight", model[0].in_proj_weight), "its in_proj_weight is also .* 1"),
        (lambda model: setattr(model, "kept", [model[0]]), "held by the attribute kept of the model too"),
        (lambda model: setattr(model, "kept", model[0].in_proj_bias), "in_proj_bias is also that of"),
        (lambda model: setattr(model[1].in_proj_weight, "data", model[0].in_proj_weight.data), "also that of 1.in_pro"),
    ]:
        model = nn.ModuleList([attention(), attention()])
        change(model)
        with pytest.raises(ValueError, match=f"0: it cannot be split, .*{reason}"):
            lrc.split_attention_(model)
        assert type(model[0]) is nn.MultiheadAttention


def test_a_tie_of_weights_that_stay_the_same_stays():
    model = nn.ModuleList([attention(kdim=8, vdim=4), nn.Linear(8, 8)])
    model[1].weight = model[0].q_proj_weight
    model.append(attention())
    model[2].out_proj.weight = model[1].weight
    assert lrc.split_attention_(model) == ("0", "2")
    assert model[0].q_proj.weight is model[1].weight is model[2].out_proj.weight


def test_what_is_inside_an_adapter_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("attn", attention(batch_first=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn"]))
    with pytest.raises(ValueError, match=r"attn.base_layer: .* inside an adapter of peft.*merge_and_unload\(\) first"):
        lrc.split_attention_(adapted)


def test_an_interrupt_between_two_of_them_takes_all_back(monkeypatch):
    model = nn.ModuleList([attention(), attention()])
    before = list(model)

    class Interrupted(dict):
        def __getitem__(self, module):
            if module is before[1]:
                raise KeyboardInterrupt
            return super().__getitem__(module)

    from lr_callback.edits.attention import _swap

    with pytest.raises(KeyboardInterrupt):
        _swap(model, Interrupted({one: SplitAttention(one) for one in before}))
    assert list(model) == before


def test_after_it_the_layers_are_like_others_and_a_cut_can_be_undone():
    model = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0)
    lrc.split_attention_(model)
    allocation = lrc.allocate(model, 0.5)
    assert set(allocation.skipped) == set()
    assert len(allocation.layers) == 10
    dense = copy.deepcopy(model)
    report = lrc.factorize_(model, allocation)
    assert {"self_attn.q_proj", "multihead_attn.out_proj"} <= set(report.factorized)
    lrc.restore_(dense, model.state_dict())
    words = torch.randn(4, 2, 16)
    torch.testing.assert_close(dense(words, words), model(words, words))
    assert repr(dense) == repr(model)
    lrc.densify_(model)
    assert type(model.self_attn.q_proj) is nn.Linear
