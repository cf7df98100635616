"""Values: a model that refuses a file, or that a file is refused for, has the values it had."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lr_callback as lrc


def network(change=lambda model: None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.LayerNorm(32))
    change(model)
    return model


def written(seed=1):
    """Return a file of which every layer is factorized and every value another."""
    model = network(seed=seed)
    for value in (*model.parameters(), *model.buffers()):
        value.data += 1
    assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized
    return model.state_dict()


def expanded(*shape):
    return torch.zeros(*(1 for _ in shape)).expand(*shape)


def overlapping(*shape):
    """Return a tensor each entry of which is also the next one of the row before."""
    return torch.zeros(sum(shape)).as_strided(shape, [1 for _ in shape])


@pytest.fixture
def quantized():
    """Return what quantizes all Linear of a model in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("torchao.quantization")

    def quantize(model):
        package.quantize_(model, package.Int8WeightOnlyConfig())
        return model.eval()

    return quantize


def made_under_inference_mode(model):
    with torch.inference_mode():
        model[2] = nn.Linear(32, 32)


CHANGES = {
    "expanded weight": (lambda one: setattr(one[3], "weight", nn.Parameter(expanded(32))), r"3\.weight", "expanded"),
    "expanded bias": (lambda one: setattr(one[2], "bias", nn.Parameter(expanded(32))), r"2\.bias", "expanded"),
    "expanded buffer": (lambda one: setattr(one[1], "running_mean", expanded(32)), r"1\.running_mean", "expanded"),
    "inference": (made_under_inference_mode, r"2\.bias", r"made under `torch\.inference_mode\(\)`"),
}


@pytest.mark.situation("Bad input", "a model whose weights cannot be written: expanded, of inference mode", "refused")
@pytest.mark.parametrize(("change", "name", "found"), CHANGES.values(), ids=CHANGES)
def test_a_model_that_cannot_be_written_is_refused_by_name_and_stays_as_it_is(change, name, found):
    model = network(change)
    before, layers = copy.deepcopy(model.state_dict()), list(model)
    message = rf"`model`: {name} must be a tensor that can be written, found .*{found}.*; .*Nothing was changed"
    with pytest.raises(ValueError, match=message):
        lrc.restore_(model, written())
    assert list(model) == layers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_weight_that_overlaps_itself_is_refused_and_stays_as_it_is():
    model = network(lambda one: setattr(one[2], "weight", nn.Parameter(overlapping(32, 32))))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`model`: 2\.weight must be .*found an expanded one.*Nothing was changed"):
        lrc.restore_(model, network(seed=1).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_quantized_model_is_refused_and_says_when_to_quantize(quantized):
    source = network(lambda one: lrc.factorize_(one, lrc.allocate(one, 0.5, method=lrc.ALDS(max_slices=1))))
    model = quantized(copy.deepcopy(source))
    before = model(torch.ones(2, 32))
    message = (
        r"`model`: 0\.encoder\.weight must be a tensor that can be written, found one of the class Int8Tensor; "
        r"restore the model first, then quantize or shard it\. Nothing was changed"
    )
    with pytest.raises(ValueError, match=message):
        lrc.restore_(model, source.state_dict())
    assert torch.equal(model(torch.ones(2, 32)), before)


@pytest.mark.situation("Bad input", "a model or a file with quantized weights (torchao)", "refused")
@pytest.mark.parametrize("form", ["dict", "file"])
@pytest.mark.parametrize("own", ["dense", "quantized"])
def test_a_quantized_file_is_refused_and_says_what_to_restore(quantized, form, own, tmp_path):
    source = quantized(network(seed=2)).state_dict()
    torch.save(source, tmp_path / "quantized.pt")
    model = quantized(network()) if own == "quantized" else network()
    before = model(torch.ones(2, 32))
    message = (
        r"`source`: 0\.weight must be a plain tensor, found one of the class Int8Tensor; restore a file from before "
        r"the model was quantized or sharded, and do that again\. Nothing was changed"
    )
    with pytest.raises(ValueError, match=message):
        lrc.restore_(model, source if form == "dict" else tmp_path / "quantized.pt")
    assert torch.equal(model(torch.ones(2, 32)), before)


def beside(model):
    """Let the weights of two layers overlap in their middle."""
    flat = torch.randn(40 * 32)
    model[0].weight.data, model[2].weight.data = flat[: 32 * 32].view(32, 32), flat[8 * 32 :].view(32, 32)


@pytest.mark.situation(
    "Bad input", "two weights that overlap in memory, and a file in which they do not agree", "refused"
)
def test_numbers_that_would_write_over_each_other_are_refused_and_others_are_not():
    model = network(beside)
    before = copy.deepcopy(model.state_dict())
    message = (
        r"`source`: 0\.weight and 2\.weight must agree where they lie in the same memory in the model, found numbers "
        r"that differ; .*Nothing was changed"
    )
    with pytest.raises(ValueError, match=message):
        lrc.restore_(model, network(seed=1).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    agreeing = network(beside, seed=2).state_dict()
    lrc.restore_(model, copy.deepcopy(agreeing))
    assert all(torch.equal(value, agreeing[name]) for name, value in model.state_dict().items())


def test_inside_inference_mode_its_weights_can_be_written():
    model = network(made_under_inference_mode)
    with torch.inference_mode():
        lrc.restore_(model, written())
    assert all(torch.equal(value, written()[name]) for name, value in model.state_dict().items())


class Counting(nn.Module):
    """A module with extra state, which it changes and gives out itself, and a buffer that no file has."""

    def __init__(self, calls, extra=None):
        super().__init__()
        self.counted, self.extra = {"calls": calls}, extra
        self.register_buffer("unsaved", expanded(3), persistent=False)
        self.register_buffer("saved", torch.full((3,), float(calls)))

    def get_extra_state(self):
        return self.counted if self.extra is None else {**self.counted, "more": self.extra}

    def set_extra_state(self, state):
        self.counted["calls"] = state["calls"]


class Refusing(nn.Module):
    def get_extra_state(self):
        return 0

    def set_extra_state(self, state):
        raise AssertionError("not taken")


@pytest.mark.parametrize("extra", [None, (one for one in ())], ids=["plain", "without a copy"])
def test_what_a_later_module_refuses_is_put_back_past_what_cannot_be_written(extra):
    model = nn.Sequential(nn.Linear(2, 2), Counting(3, extra), nn.LayerNorm(2), Refusing())
    source = nn.Sequential(nn.Linear(2, 2), Counting(7), nn.LayerNorm(2), Refusing())
    weight = model[0].weight.clone()
    with pytest.raises(AssertionError, match="not taken"):
        lrc.restore_(model, source.state_dict())
    assert model[1].saved.tolist() == [3, 3, 3]
    assert torch.equal(model[0].weight, weight)
    assert extra is not None or model[1].counted == {"calls": 3}


def test_a_module_whose_state_dict_is_a_plain_dict_is_restored():
    class Plain(nn.Linear):
        def state_dict(self, *arguments, **named):
            return dict(super().state_dict(*arguments, **named))

    source, model = Plain(4, 3), Plain(4, 3)
    lrc.restore_(model, source.state_dict())
    assert torch.equal(model.weight, source.weight)
