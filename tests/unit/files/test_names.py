"""Names: the same weights under other names come back, and weights that only share a name do not."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.files.names import naming


class Holding(nn.Module):
    """A module that holds the network under a name, beside something else."""

    def __init__(self, network):
        super().__init__()
        self.network, self.loss = network, nn.Linear(2, 2)


def network(seed=0, cut=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Sequential(nn.Linear(32, 16)))
    if cut:
        assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized
    return model


def compiled(module):
    return torch.compile(module, backend="eager")


def half_compiled(model):
    model[2] = compiled(model[2])
    return model


FORMS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "a part compiled": half_compiled,
    "compiled twice over": lambda model: compiled(half_compiled(model)),
    "held": Holding,
    "compiled and held": lambda model: Holding(compiled(model)),
    "held and compiled": lambda model: compiled(Holding(model)),
}
INNER = ("plain", "compiled", "a part compiled", "compiled twice over")


def weights(model):
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.situation("Checkpoints", "files of a compiled model into the plain one, and the other way round", "works")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("own", INNER)
def test_what_torch_compile_puts_into_names_does_not_matter(own, written, cut):
    wanted = weights(network(1, cut))
    model = FORMS[own](network(2, not cut))
    lrc.restore_(model, FORMS[written](network(1, cut)).state_dict())
    assert same(weights(model), wanted)


@pytest.mark.parametrize("own", ["held", "compiled and held", "held and compiled"])
def test_a_module_that_holds_a_compiled_one_takes_a_file_of_it(own):
    source = FORMS["compiled and held"](network(1, cut=True))
    model = FORMS[own](network(2))
    lrc.restore_(model, source.state_dict())
    assert same(weights(model), weights(source))


@pytest.mark.parametrize("own", INNER)
def test_an_allocation_of_a_compiled_model_is_for_the_plain_one_too(own):
    for written in INNER:
        allocation = lrc.allocate(FORMS[written](network()), 0.5)
        model = FORMS[own](network())
        lrc.restore_(model, allocation)
        assert weights(model).keys() == weights(network(cut=True)).keys()


def test_two_entries_for_one_name_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    twice = {**model.state_dict(), "_orig_mod.0.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"one entry for 0\.weight, found 0\.weight and _orig_mod\.0\.weight; "):
        lrc.restore_(model, twice)
    assert model[0].weight.any()


def test_a_file_of_another_model_is_still_refused():
    with pytest.raises(ValueError, match=r"_orig_mod\.1\.weight: shape \(8,\) in the model, nothing in the file"):
        lrc.restore_(
            compiled(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))), nn.Sequential(nn.Linear(8, 8)).state_dict()
        )


class Tied(nn.Module):
    """Two names of one weight, of one layer, and of two parameters in one memory."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.body = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.head, self.again = nn.Linear(32, 50, bias=False), self.body
        self.head.weight = self.embedding.weight
        self.one, self.other = nn.LayerNorm(32), nn.LayerNorm(32)
        self.other.weight.data = self.one.weight.data


@pytest.mark.situation("Checkpoints", "a file that has tied weights under one of their names", "works")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dropped", [("head.", "again.", "other.weight"), ("embedding.", "body.", "one.weight")])
@pytest.mark.parametrize("held", [False, True])
def test_names_may_be_missing_that_are_tied_to_one_that_is_there(cut, dropped, held):
    source, model = Tied(1), Tied(2)
    for one in [source] if cut else [model]:
        assert lrc.factorize_(one, lrc.allocate(one, 0.8)).factorized == ("body",)
    wanted = source.state_dict()
    file = {name: value for name, value in wanted.items() if not name.startswith(dropped)}
    assert len(file) < len(wanted)
    lrc.restore_(model, {f"network.{name}": value for name, value in file.items()} if held else file)
    assert same(model.state_dict(), wanted)
    assert model.head.weight is model.embedding.weight
    assert model.again is model.body


class OneBias(nn.Module):
    """One bias of its own, of a layer with two names, of a layer that stays dense and of a LayerNorm."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.other, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.again, self.bias = self.layer, self.layer.bias
        self.other.bias = self.norm.bias = self.bias
        nn.init.normal_(self.bias)


@pytest.mark.situation("Checkpoints", "a bias that is tied to another parameter, of a factorized layer", "works")
@pytest.mark.parametrize("written", [(), ("layer",), ("layer", "other")])
@pytest.mark.parametrize("own", [(), ("layer",), ("layer", "other")])
@pytest.mark.parametrize("kept", ["", "bias", "again.", "norm.bias"])
def test_a_tied_bias_comes_back_whatever_the_structure_of_its_layers(written, own, kept):
    source, model = OneBias(1), OneBias(2)
    for one, names in ((source, written), (model, own)):
        if names:
            assert lrc.factorize_(one, lrc.allocate(one, 0.8, include=names)).factorized == names
    wanted = source.state_dict()
    file = {name: one for name, one in wanted.items() if not name.endswith("bias") or name.startswith(kept)}
    lrc.restore_(model, {f"network.{name}": value for name, value in file.items()})
    assert same(model.state_dict(), wanted)
    assert model.layer.bias is model.bias is model.other.bias is model.norm.bias


def test_names_may_not_be_missing_where_the_model_has_tensors_of_their_own():
    source, model = Tied(1), Tied(2)
    model.head.weight = nn.Parameter(torch.zeros(50, 32))
    file = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    with pytest.raises(ValueError, match=r"head\.weight: shape \(50, 32\) in the model, nothing in the file"):
        lrc.restore_(model, file)
    assert not model.head.weight.any()


@pytest.mark.situation("Bad input", "a file with two different values for what is one tensor in the model", "refused")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("embedding.weight", "head.weight"),
        ("body.{}bias", "again.{}bias"),
        ("body.{}weight", "again.{}weight"),
        ("one.weight", "other.weight"),
    ],
)
def test_two_values_for_one_tensor_are_refused_by_name(first, second, cut):
    source, model = Tied(1), Tied(2)
    if cut:
        assert lrc.factorize_(source, lrc.allocate(source, 0.8)).factorized == ("body",)
    first, second = (name.format("decoder." if cut else "") for name in (first, second))
    file, before = source.state_dict(), copy.deepcopy(model.state_dict())
    file[second] = file[first] + torch.eye(*file[first].shape) if file[first].dim() > 1 else file[first] + 1
    with pytest.raises(ValueError, match=rf"{first} and {second} must be equal, they are one tensor.*Nothing was ch"):
        lrc.restore_(model, file)
    assert same(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore:`source`. every weight should be finite")
def test_two_values_that_are_one_in_the_model_are_no_two():
    source, model = Tied(1), Tied(2).to(torch.bfloat16)
    file = copy.deepcopy(source.state_dict())
    file["head.weight"][0, 0] = file["embedding.weight"][0, 0] = float("nan")
    file["head.weight"] = file["head.weight"].to(torch.bfloat16)
    lrc.restore_(model, file)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight[1:], file["head.weight"][1:])


class Extra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("values", [(1, 2, 3), (torch.zeros(2), torch.ones(2), torch.zeros(3))], ids=["int", "tensor"])
def test_extra_states_that_are_one_object_are_not_tied(values):
    now, one, other = values
    model = nn.Sequential(Extra(now), Extra(now))
    lrc.restore_(model, {"0._extra_state": one, "1._extra_state": other})
    assert model[0].extra is one
    assert model[1].extra is other
    with pytest.raises(ValueError, match=r'Missing key.*"1\._extra_state"'):
        lrc.restore_(model, {"0._extra_state": one})


def test_what_has_no_memory_of_its_own_is_tied_to_nothing():
    model = nn.ParameterList([torch.zeros(0), torch.zeros(0), torch.zeros(2).to_sparse()])
    assert naming(model, {}, ["0"]).entries({"0": 1}) == {"0": 1}
