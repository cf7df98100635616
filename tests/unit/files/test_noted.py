"""Noted: an allocation in a file is that of its weights, whatever the names around it, or the file is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lr_callback as lrc
from lr_callback.files.noted import in_the_names_of


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


class Holder(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.network, self.head = network(seed), nn.Linear(32, 32)


def cut(model, **options):
    """Cut a model; return its allocation."""
    allocation = lrc.allocate(model, 0.7, **options)
    assert lrc.factorize_(model, allocation).factorized
    return allocation


def renamed(allocation, change):
    """Return an allocation with other names for its layers."""
    tables = {field: getattr(allocation, field) for field in ("layers", "skipped", "shapes")}
    return replace(allocation, **{key: {change(name): one for name, one in tables[key].items()} for key in tables})


def written(path, form, state, allocation):
    """Write weights and an allocation in one of the ways that they come in."""
    text = allocation.to_json()
    if form == "header":
        save_file({name: value.detach().clone() for name, value in state.items()}, path, {"allocation": text})
    else:
        torch.save({"state_dict": state, "allocation": text if form == "text" else json.loads(text)}, path)
    return path


def plain():
    model = network(1)
    return model, cut(model), network()


def of_a_larger_module():
    model = Holder(1)
    return model, cut(model), network()


def under_longer_names():
    model = network(1)
    return model, renamed(cut(model), lambda name: f"model.network.{name}"), network()


def under_shorter_names():
    model = Holder(1)
    return model, cut(model.network), Holder()


def compiled():
    model = network(1)
    return model, renamed(cut(model), lambda name: f"_orig_mod.{name}"), network()


def compiled_beside_a_dense_part():
    model = Holder(1)
    model.network = torch.compile(model.network)
    return model, cut(model, exclude="head"), Holder()


@pytest.mark.parametrize("form", ["header", "text", "dict"])
@pytest.mark.parametrize(
    "make", [plain, of_a_larger_module, under_longer_names, under_shorter_names, compiled, compiled_beside_a_dense_part]
)
def test_an_allocation_under_other_names_is_that_of_the_weights(make, form, tmp_path):
    source, allocation, model = make()  # a warning is an error in these tests
    lrc.restore_(model, written(tmp_path / "file", form, source.state_dict(), allocation))
    inner = source.network if isinstance(source, Holder) and not isinstance(model, Holder) else source
    pairs = zip(model.state_dict().values(), inner.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def another_rank(allocation):
    name, one = next(iter(allocation.factorized.items()))
    return replace(allocation, layers={**allocation.layers, name: replace(one, rank=one.rank - 1)})


def said_to_be_dense(allocation):
    return replace(allocation, layers={**allocation.layers, next(iter(allocation.factorized)): None})


@pytest.mark.situation("Bad input", "a file whose allocation contradicts its weights", "refused")
@pytest.mark.parametrize("form", ["header", "text", "dict"])
@pytest.mark.parametrize(
    ("change", "dense", "found"),
    [
        (
            another_rank,
            False,
            r"0 is of \d+ slices and rank \d+ in the allocation and of \d+ slices and rank \d+ in the w",
        ),
        (said_to_be_dense, False, r"0 is dense in the allocation and of \d+ slices and rank \d+ in the weights"),
        (
            lambda allocation: allocation,
            True,
            r"0 is of \d+ slices and rank \d+ in the allocation and dense in the weig",
        ),
    ],
)
def test_an_allocation_that_contradicts_the_weights_is_refused(change, dense, found, form, tmp_path):
    source = network(1)
    allocation = cut(source)
    if dense:
        lrc.densify_(source)
    model = network()
    before, layers = copy.deepcopy(model.state_dict()), list(model)
    path = written(tmp_path / "file", form, source.state_dict(), change(allocation))
    message = rf"`source`: the allocation in the file must be that of its weights, they differ at \d layers: {found}"
    with pytest.raises(ValueError, match=rf"{message}.*Nothing was changed"):
        lrc.restore_(model, path)
    assert list(model) == layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.situation("Bad input", "a file whose allocation names other layers: loaded, with a warning", "works")
@pytest.mark.parametrize("form", ["header", "dict"])
def test_an_allocation_of_other_names_is_told_and_the_weights_decide(form, tmp_path):
    source = network(1)
    allocation = renamed(cut(source), lambda name: f"block{name}.conv")
    path, model = written(tmp_path / "file", form, source.state_dict(), allocation), network()
    message = (
        r"should name its layers, found block0\.conv, .*; the weights have 0, 2, 3\. The structure is that of the w"
    )
    with pytest.warns(UserWarning, match=message):
        lrc.restore_(model, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("noted", ["of another tool", 3, {"cpu": 1}, None], ids=str)
def test_what_another_tool_calls_an_allocation_is_none_of_ours(noted):
    source, model = network(1), network()
    cut(source)
    lrc.restore_(model, {"state_dict": source.state_dict(), "allocation": noted})
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_header_of_a_newer_version_is_refused(tmp_path):
    source, model = network(1), network()
    newer = json.loads(cut(source).to_json()) | {"version": 99}
    save_file(source.state_dict(), tmp_path / "file", {"allocation": json.dumps(newer)})
    with pytest.raises(ValueError, match="version"):
        lrc.restore_(model, tmp_path / "file")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("own", "fits"),
    [
        ([(["0"], (2, 3))], True),
        ([(["a.model.0"], (2, 3))], True),
        ([(["0"], (2, 4))], False),
        ([(["1"], (2, 3))], False),
    ],
)
def test_an_allocation_goes_into_the_names_of_a_model_or_nowhere(own, fits):
    allocation = cut(network(1), include="0")
    one = replace(allocation.layers["0"], num_slices=2, rank=3)
    noted = renamed(replace(allocation, layers={"0": one}), lambda name: f"model.{name}")
    found = in_the_names_of(noted, own)
    assert (found is not None) == fits
    assert not fits or list(found.layers) == own[0][0]
