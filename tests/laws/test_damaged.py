"""Whatever a file holds, it is read, or refused with a text of ours and the model as it was."""

import copy
import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
SCALARS = st.one_of(NUMBERS, st.none(), st.text(max_size=4), st.sampled_from(["origami", "height_in_decoder", "\0"]))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 8))


@cache
def written():
    return lrc.allocate(network(), 0.5).to_json()


@cache
def factorized_state():
    model = network()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    return model.state_dict()


def places(value, at=()):
    """Return the keys that lead to every entry of nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in [(*at, key), *places(one, (*at, key))]]


@st.composite
def mutated(draw):
    """Draw a written allocation with one to three entries dropped, replaced or added."""
    allocation = json.loads(written())
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(allocation)))
        holder = allocation
        for key in path:
            holder = holder[key]
        change = draw(st.sampled_from(["drop", "replace", "add"]))
        if change == "drop":
            del holder[last]
        elif change == "replace" or isinstance(holder, list):
            holder[last] = draw(VALUES)
        else:
            holder[draw(st.text(max_size=3))] = draw(VALUES)
    return allocation


def bits(model):
    named = [(name, id(one)) for name, one in model.named_modules()]
    return named, {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one[0] == other[0] and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


def restored_or_refused(source):
    model = network()
    before = bits(model)
    try:
        lrc.restore_(model, source)
    except (ValueError, TypeError) as error:
        ours = "Nothing was changed", "Allocation", "`source`"
        assert any(text in str(error) for text in ours), error
        assert same(bits(model), before)
    else:
        assert model(torch.ones(2, 4, 4, 4)).shape == (2, 8)


@given(mutated())
def test_a_mutated_allocation_is_valid_or_refused(allocation):
    try:
        read = lrc.Allocation.from_dict(allocation)
    except ValueError as error:
        assert str(error).startswith("Allocation")
    else:
        assert lrc.Allocation.from_json(read.to_json()) == read
        assert str(read)
    restored_or_refused(allocation)


@given(mutated())
def test_a_mutated_text_is_valid_or_refused(allocation):
    restored_or_refused(json.dumps(allocation))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_file_with_other_bytes_in_it_is_valid_or_refused(tmp_path_factory, at, put):
    good = written().encode()
    at %= len(good)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(good[:at] + put + good[at + len(put) :])
    restored_or_refused(path)


@given(VALUES)
def test_anything_is_refused_that_is_no_allocation(value):
    with pytest.raises(ValueError, match=r"^Allocation"):
        lrc.Allocation.from_dict(value)


ODD = (
    lambda value: value.to(torch.complex64),
    lambda value: value.to(torch.int32),
    lambda value: value.to_sparse(),
    lambda value: value.to("meta"),
    lambda value: value.reshape(-1),
    lambda value: value[:0],
    lambda value: value.new_zeros([0]),
    lambda value: torch.tensor(1.0),
    lambda value: "a text",
    lambda value: None,
    lambda value: math.nan,
    lambda value: value.tolist(),
    lambda value: value.double(),
    lambda value: value.expand(2, *value.shape),
)


@given(st.sampled_from([False, True]), st.data())
def test_a_mutated_state_dict_is_loaded_or_refused(factorized, data):
    original = factorized_state() if factorized else network().state_dict()
    state = dict(original)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        change = data.draw(st.sampled_from([*ODD, None]))
        value = state.pop(name)
        if change is None or name not in original or original[name].dim() == 0:
            state[data.draw(st.sampled_from(["3.weight", "9.x", name.replace("encoder", "decoder")]))] = value
        else:
            state[name] = change(original[name].clone())
    restored_or_refused({"state_dict": state} if data.draw(st.booleans()) else state)


@pytest.mark.parametrize("depth", [50, 100_000])
def test_a_deeply_nested_file_is_refused(depth):
    nested = '{"a":' * depth + "1" + "}" * depth
    with pytest.raises(ValueError, match="Allocation"):
        lrc.Allocation.from_json(nested)
    with pytest.raises(ValueError, match=r"`method` must hold names, numbers and lists|nested too deeply"):
        lrc.Allocation.from_json(written().replace('"method": {', '"method": {"x": ' + nested + ", "))


def test_a_number_of_more_digits_than_python_reads_is_refused_as_text_and_as_a_number():
    with pytest.raises(ValueError, match=r"Allocation text: must be JSON that can be read, Exceeds the limit"):
        lrc.Allocation.from_json(written().replace('"budget": ', '"budget": 1' + "0" * 5000))
    for name in ("version", "budget", "keep_ratio", "method", "layers"):
        with pytest.raises(ValueError, match=rf"Allocation: `{name}` must be"):
            lrc.Allocation.from_dict({**json.loads(written()), name: 10**5000})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_error", math.nan, "layer '3': `relative_error` must be a finite number from 0, got float 'nan'"),
        ("relative_error", -0.5, "`relative_error` must be a finite number from 0"),
        ("rank", -2, "`num_slices` and `rank` must be at least 1, got 1, -2"),
        ("rank", 2**70, "`rank` must be a whole number of 64 bits"),
        ("cost", 10**400, "`cost` must be a whole number of 64 bits"),
    ],
)
def test_numbers_that_no_layer_has_are_refused_by_name(field, value, message):
    allocation = copy.deepcopy(json.loads(written()))
    allocation["layers"]["3"] = {**allocation["layers"]["0"], "num_slices": 1, "rank": 2, field: value}
    with pytest.raises(ValueError, match=message):
        lrc.Allocation.from_dict(allocation)


@pytest.mark.parametrize("path", ["\0", "x" * 5000, "", "a/\0/b.json"], ids=range(4))
def test_what_cannot_be_a_path_is_no_file(path):
    with pytest.raises(FileNotFoundError, match="no such file; `source` must be an allocation"):
        lrc.restore_(network(), path)
