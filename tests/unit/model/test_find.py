"""Find: every layer with a weight is either found or listed with a reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lr_callback as lrc
from lr_callback.model.find import check_weight, find_layers

COMPUTED = "its weight is computed from other parameters (weight_norm, pruning or another parametrization)"


class Own(nn.Linear):
    """A subclass, whose forward may do anything."""


class Tied(nn.Module):
    """A language model's usual tie."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_layers_are_found_in_the_order_of_the_model_under_their_names():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ModuleDict({"inner": nn.Linear(4, 4)}), nn.BatchNorm2d(4), nn.Linear(4, 1)
    )
    found = find_layers(model)
    assert list(found.layers) == ["0", "1.inner", "3"]
    assert found.layers["1.inner"] is model[1]["inner"]
    assert found.skipped == {}


def test_a_factorized_layer_is_found_as_one_layer_without_its_factors():
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(8, 16, 3))
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert list(find_layers(model).layers) == ["0", "1"]
    assert find_layers(model).skipped == {}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Bilinear(4, 4, 8), "Bilinear is not among the layer types that are factorized"),
        (nn.EmbeddingBag(4, 8), "EmbeddingBag is not among the layer types that are factorized"),
        (nn.Embedding(4, 8, max_norm=1.0), "max_norm=1.0: it changes rows of its weight as it looks them up"),
        (
            nn.Embedding.from_pretrained(torch.ones(4, 8), padding_idx=1),
            "its row padding_idx=1 is not zero: it is fixed, and would move with the decoder",
        ),
        (nn.LSTM(4, 8), "LSTM is not among the layer types that are factorized"),
        (Own(4, 8), "Own is not among the layer types that are factorized"),
        (nn.Linear(4, 8, device="meta"), "its weight is on the meta device and has no values"),
        (nn.LazyLinear(8), "its weight is not initialised yet; run one batch first"),
        (nn.LazyConv2d(8, 3), "its weight is not initialised yet; run one batch first"),
        (parametrizations.weight_norm(nn.Linear(4, 8)), COMPUTED),
        (parametrizations.spectral_norm(nn.Conv2d(4, 8, 3)), COMPUTED),
        (prune.l1_unstructured(nn.Linear(4, 8), "weight", 0.5), COMPUTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_factorized_is_skipped_with_its_reason(layer, reason):
    found = find_layers(nn.Sequential(layer, nn.Linear(4, 4)))
    assert found.skipped == {"0": reason}
    assert list(found.layers) == ["1"]


def test_an_empty_weight_is_skipped_with_its_shape():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(0, 8)
    assert find_layers(nn.Sequential(layer)).skipped == {"0": "its weight is empty, of shape (8, 0)"}


def test_a_weight_of_whole_numbers_is_skipped():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert "dtype torch.int8" in find_layers(nn.Sequential(layer)).skipped["0"]


def test_a_lazy_layer_is_found_once_it_has_seen_a_batch():
    model = nn.Sequential(nn.LazyLinear(8))
    model(torch.zeros(2, 4))
    assert list(find_layers(model).layers) == ["0"]


def test_a_parametrized_layer_is_found_again_once_the_parametrization_is_gone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)))
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert list(find_layers(model).layers) == ["0"]


def test_a_tied_weight_is_skipped_and_names_its_partner():
    found = find_layers(Tied())
    assert list(found.layers) == ["body"]
    assert found.skipped["head"] == "its weight is tied to that of embedding"


def test_a_shared_layer_stands_under_its_first_name():
    shared = nn.Linear(4, 4)
    assert list(find_layers(nn.Sequential(shared, nn.ReLU(), shared)).layers) == ["0"]


def test_all_of_nn_multiheadattention_is_left_alone_and_what_follows_it_is_not():
    found = find_layers(nn.TransformerEncoderLayer(8, 2, 16))
    assert list(found.layers) == ["linear1", "linear2"]
    assert found.skipped == {
        "self_attn": "MultiheadAttention is not among the layer types that are factorized; "
        "split_attention_(model) makes layers of it",
        "self_attn.out_proj": "read directly by nn.MultiheadAttention; split_attention_(model) makes layers of it",
    }


@pytest.mark.parametrize("first", ["around", "alone"])
def test_a_layer_is_left_alone_if_one_of_its_names_is_inside_of_what_reads_it(first):
    attention, model = nn.MultiheadAttention(8, 2), nn.Module()
    attention.out_proj = nn.Linear(8, 8)
    parts = {"around": attention, "alone": attention.out_proj}
    for name in sorted(parts, key=lambda name: name != first):
        setattr(model, name, parts[name])
    name = "around.out_proj" if first == "around" else "alone"
    found = find_layers(model)
    assert found.layers == {}
    assert found.skipped[name] == "read directly by nn.MultiheadAttention; split_attention_(model) makes layers of it"


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)])
def test_a_model_that_is_itself_a_layer_says_what_to_do(layer):
    assert "put it into an nn.Sequential" in find_layers(layer).skipped[""]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, None, ["a.0", "a.1", "b"]),
        ("a.*", None, ["a.0", "a.1"]),
        (["b", "a.1"], None, ["a.1", "b"]),
        (None, ["*.0"], ["a.1", "b"]),
        (["a.*"], "a.0", ["a.1"]),
        ([], None, []),
    ],
)
def test_patterns_select_by_name(include, exclude, names):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "b": nn.Linear(4, 4)})
    found = find_layers(model, include, exclude)
    assert list(found.layers) == names
    assert set(found.skipped) == {"a.0", "a.1", "b"} - set(names)
    assert set(found.skipped.values()) <= {"not among `include`", "named by `exclude`"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_and_the_names_are_told(argument):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match=rf"`{argument}`.*'head\*' matches none of: 0, 1"):
        find_layers(model, **{argument: ["0", "head*"]})


def test_a_pattern_on_a_model_without_layers_says_so():
    with pytest.raises(ValueError, match=r"matches none of: \(the model has no layers with a weight\)"):
        find_layers(nn.ReLU(), include="*")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_name_and_the_number(value):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, :2] = value
    with pytest.raises(ValueError, match=r"body\.0: every weight must be finite, found 2 of 16 NaN or infinite"):
        check_weight("body.0", layer)


def test_a_weight_of_zeros_has_a_reason_and_any_other_has_none():
    layer = nn.Linear(4, 4)
    assert check_weight("0", layer) is None
    nn.init.zeros_(layer.weight)
    assert "all its weights are zero" in check_weight("0", layer)


def test_finding_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    before = [(name, id(module), module.training) for name, module in model.named_modules()]
    find_layers(model, include="0")
    assert [(name, id(module), module.training) for name, module in model.named_modules()] == before
    assert isinstance(model[1], nn.LazyLinear)
