"""What a model can be restored from, beyond the plain cases."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.files.hook import install_hook


class Counting(nn.Module):
    """A module whose extra state is a dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.calls = 3

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def test_an_allocation_is_known_by_its_content_not_by_the_name_of_its_file(tmp_path):
    model, fresh = network(), network()
    allocation = lrc.allocate(model, 0.5)
    allocation.to_json(tmp_path / "allocation.txt")
    lrc.restore_(fresh, tmp_path / "allocation.txt")
    assert sum(parameter.numel() for parameter in fresh.parameters()) == allocation.cost


def test_extra_state_is_restored_and_does_not_stand_in_the_way(tmp_path):
    model, fresh = Counting(), Counting()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    model.calls = 7
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    lrc.restore_(fresh, tmp_path / "last.ckpt")
    assert fresh.calls == 7
    assert torch.equal(fresh.body[0].weight, model.body[0].weight)


def test_a_file_with_objects_names_the_way_for_a_trusted_one(tmp_path):
    torch.save({"state_dict": network().state_dict(), "made_by": network()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"restore_\(model, torch\.load\(path, weights_only=False\)\)"):
        lrc.restore_(network(), tmp_path / "last.ckpt")


def test_a_strict_load_of_another_model_changes_nothing_and_says_what_differs():
    model, other = network(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))
    lrc.factorize_(other, lrc.allocate(other, 0.6, include="0"))
    install_hook(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"names or shapes differ: .*Nothing was changed"):
        model.load_state_dict(other.state_dict())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "allocation.json").write_bytes(b'{"version": 1, \xff\xfe')
    with pytest.raises(ValueError, match=r"allocation\.json': must be JSON in UTF-8"):
        lrc.restore_(network(), tmp_path / "allocation.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unit", "bananas", "`unit` must be one of"),
        ("keep_ratio", 7, r"`keep_ratio` must be in \(0, 1\], got 7"),
        ("dense_cost", 0, "`cost` must be from 0 to `dense_cost`"),
        ("cost", -1, "`cost` must be from 0 to `dense_cost`"),
        ("skipped", {3: "a reason"}, "names of layers must be strings"),
    ],
)
def test_an_allocation_out_of_range_is_refused(field, value, message):
    written = lrc.allocate(network(), 0.5).to_dict()
    with pytest.raises(ValueError, match=message):
        lrc.restore_(network(), {**written, field: value})


def test_a_layer_that_costs_less_than_nothing_is_refused():
    written = lrc.allocate(network(), 0.5).to_dict()
    name = next(name for name, layer in written["layers"].items() if layer is not None)
    written["layers"][name]["dense_cost"] = -1
    with pytest.raises(ValueError, match=f"layer '{name}': `cost` and `dense_cost` must be at least 0, got .* and -1"):
        lrc.Allocation.from_dict(written)


@pytest.mark.situation("Bad input", "a file with numbers beyond the model's dtype", "refused")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("written", "own", "value", "found"),
    [
        (torch.float64, torch.float32, 1e300, r"1e\+300"),
        (torch.float32, torch.float16, -1e5, r"-100000"),
        (torch.bfloat16, torch.float16, 1e10, r"9\.99922e\+09"),
    ],
)
def test_finite_numbers_that_would_become_infinite_are_refused_by_name(cut, written, own, value, found):
    source, model = (nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)) for _ in range(2))
    if cut:
        lrc.factorize_(source, lrc.allocate(source, 0.5))
    state, model, before = source.to(written).state_dict(), model.to(own), copy.deepcopy(model.to(own).state_dict())
    name = "0.decoder.weight" if cut else "0.weight"
    state[name][3, 2] = value
    with pytest.raises(ValueError, match=rf"{name} must be within the range of {own}.*found ({found}), .*model\.to"):
        lrc.restore_(model, state)
    assert isinstance(model[0], nn.Linear)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    lrc.restore_(model.to(written), state)


@pytest.mark.situation("Bad input", "a file with weights that are NaN or infinite: loaded, with a warning", "works")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("written", [torch.float32, torch.float64])
def test_weights_that_are_not_finite_are_loaded_and_named(cut, value, written):
    source, model = (nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(2))
    if cut:
        lrc.factorize_(source, lrc.allocate(source, 0.5))
    state = source.to(written).state_dict()
    names = ["0.encoder.weight" if cut else "0.weight", "1.bias"]
    for name in names:
        state[name].flatten()[1] = value
    with pytest.warns(UserWarning, match=rf"finite, found NaN or infinity in {', '.join(names)}\. They") as warned:
        lrc.restore_(model, state)
    assert warned[0].filename == __file__
    assert all(torch.equal(one.isfinite(), state[key].isfinite()) for key, one in model.state_dict().items())


def test_a_buffer_may_be_infinite():
    source, model = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    for one in (source, model):
        one.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    lrc.restore_(model, source.state_dict())
    assert torch.equal(model.mask, source.mask)


@pytest.mark.parametrize("cut", [False, True])
def test_whole_numbers_that_the_model_lacks_are_told_by_name(cut):
    model, other = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    if cut:
        lrc.factorize_(other, lrc.allocate(other, 0.5))
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked: nothing in the model, shape \(\) in the file"):
        lrc.restore_(model, other.state_dict())


def holding(value, dtype):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("held", torch.as_tensor(value, dtype=dtype))
    return model


@pytest.mark.situation("Bad input", "a file with numbers that the model's whole ones do not have", "refused")
@pytest.mark.parametrize(
    ("value", "written", "own", "found"),
    [
        (2.7, torch.float32, torch.int64, r"2\.7, which would be 2"),
        (300, torch.int64, torch.int8, "300, which would be 44"),
        ([1, 0.5], torch.float16, torch.int8, r"0\.5, which would be 0"),
        (float("nan"), torch.float64, torch.int32, "nan"),
        (-1, torch.int8, torch.uint8, "-1, which would be 255"),
        ([[255]], torch.uint8, torch.int8, "255, which would be -1"),
        (2, torch.uint8, torch.bool, "2, which would be 1"),
        (2**53 + 1, torch.int64, torch.int32, "9.0072e"),
        (65535, torch.uint16, torch.int16, "65535, which would be -1"),
        (-2, torch.int64, torch.uint64, "-2, which would be 1.8"),
    ],
)
def test_numbers_that_would_become_other_whole_ones_are_refused_by_name(value, written, own, found):
    model = holding(torch.zeros(torch.as_tensor(value).shape), own)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"held must be of numbers that {own} has, .*found {found}.*{written}\. Noth"):
        lrc.restore_(model, holding(value, written).state_dict())
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "written", "own"),
    [
        ([3.0, -128.0], torch.float32, torch.int8),
        (2**53 + 1, torch.int64, torch.int64),
        ([0, 1], torch.uint8, torch.bool),
        ([True, False], torch.bool, torch.int64),
        ([], torch.float32, torch.int64),
        (2**32 - 1, torch.uint32, torch.uint64),
    ],
)
def test_the_same_numbers_may_be_of_another_dtype(value, written, own):
    model = holding(torch.zeros(torch.as_tensor(value).shape), own)
    lrc.restore_(model, holding(value, written).state_dict())
    assert model.held.dtype == own
    assert torch.equal(model.held, torch.as_tensor(value, dtype=own))
