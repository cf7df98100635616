"""Holders: what would keep a dense layer, or its weight, is found wherever it may be written down."""

import dataclasses
import weakref
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

import lr_callback as lrc
from lr_callback.model.find import find_layers
from lr_callback.model.holders import held_elsewhere, shared_memory


class Model(nn.Module):
    """Two layers, of which something may have hold besides."""

    __slots__ = ("slot",)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, inputs):
        return self.second(self.first(inputs))


@dataclasses.dataclass
class Pair:
    name: str
    layer: object


class Held(Callback):
    def __init__(self, layer):
        self.layer = layer


class Plain:
    def __init__(self, layer):
        self.layer = layer


class Average:
    """Keeps weak references to the parameters, as some averages do."""

    def __init__(self, layer):
        self.parameters = [weakref.ref(one) for one in layer.parameters()]


def closure(layer):
    return lambda *inputs: layer(sum(inputs))


def recursive(layer):
    held = [layer]
    held.append(held)
    return held


def deep(layer, depth):
    return layer if depth == 0 else [deep(layer, depth - 1)]


HOLD = {
    "list": lambda layer: [layer],
    "tuple": lambda layer: (1, layer),
    "set": lambda layer: {layer},
    "dict": lambda layer: {"a": layer},
    "key": lambda layer: {layer: "a"},
    "nested": lambda layer: {"a": [(layer,)]},
    "recursive": recursive,
    "partial": lambda layer: partial(nn.Module.__call__, layer),
    "named in a partial": lambda layer: partial(print, end=layer),
    "method": lambda layer: layer.forward,
    "closure": closure,
    "default": lambda layer: lambda inputs, layer=layer: layer(inputs),
    "namespace": lambda layer: SimpleNamespace(layer=layer),
    "dataclass": lambda layer: Pair("a", layer),
    "object": Plain,
    "object in an object": lambda layer: Plain([Plain(layer)]),
    "weak reference": weakref.ref,
    "average": Average,
    "weight": lambda layer: [layer.weight],
    "weight of a closure": lambda layer: closure(layer.weight),
}


@pytest.mark.situation("Module tricks", "layers or weights held in plain attributes as well", "works")
@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_a_layer_that_a_plain_attribute_holds_stays_and_says_where(hold):
    model = Model()
    model.held = hold(model.first)
    found = find_layers(model)
    assert list(found.layers) == ["second"]
    assert found.skipped["first"].startswith("held by the attribute held of the model too, which would keep the layer")
    layer, inputs = model.first, torch.randn(2, 32)
    outputs = model.first(inputs)
    assert lrc.factorize_(model, lrc.allocate(model, 0.9)).factorized == ("second",)
    assert model.first is layer
    assert torch.equal(model.first(inputs), outputs)
    del model.held
    assert list(find_layers(model).layers) == ["first", "second"]


@pytest.mark.parametrize("far", range(9))
def test_what_was_first_reached_from_too_far_away_is_looked_into_from_nearer(far):
    model = Model()
    near = [[[model.first]]]
    model.far, model.near = deep(near, far), near
    where = "far" if far + 3 <= 8 else "near"
    assert f"held by the attribute {where} of the model too" in find_layers(model).skipped["first"]


def test_slots_hooks_and_attributes_of_parts_are_looked_through():
    model = Model()
    model.slot = [model.first]
    model.second.register_forward_hook(partial(print, model.second))
    outer = nn.Sequential(nn.Linear(4, 4), model)
    vars(outer)["alias"] = outer[0]
    skipped = find_layers(outer).skipped
    assert "the attribute slot of 1 too" in skipped["1.first"]
    assert "the attribute _forward_hooks of 1.second too" in skipped["1.second"]
    assert "the attribute alias of the model too" in skipped["0"]


@pytest.mark.parametrize(
    "hold",
    [
        lambda model: [model],
        lambda model: lambda *inputs: model.first(sum(inputs)),
        lambda model: model.forward,
        lambda model: torch.optim.SGD(model.parameters(), 0.1),
        lambda model: type("Own", (torch.optim.SGD,), {})(model.parameters(), 0.1),
        lambda model: Trainer(callbacks=[Held(model.first)], logger=False, barebones=False, accelerator="cpu"),
        lambda model: [model.first.bias, "first", None, 3],
        lambda model: iter([model.first]),
        lambda model: [*range(20_000), model.first],
        lambda model: deep(model.first, 40),
    ],
    ids=range(10),
)
def test_what_follows_a_surgery_or_is_not_looked_through_is_no_reason(hold):
    model = Model()
    model.held = hold(model)
    assert list(find_layers(model).layers) == ["first", "second"]


def test_looking_changes_nothing_and_takes_cells_that_are_not_set():
    model = Model()

    def later():
        return unset

    model.held = [later]
    assert held_elsewhere(model, [model.first]) == {}
    unset = 3
    assert later() == 3


def viewing(one, other, kind):
    if kind == "same":
        other.weight.data = one.weight.data
    elif kind == "turned":
        other.weight.data = one.weight.data.t()
    elif kind == "a part":
        flat = torch.randn(40 * 32)
        one.weight.data, other.weight.data = flat[: 32 * 32].view(32, 32), flat[8 * 32 :].view(32, 32)
    else:
        flat = torch.randn(2, 32, 32)
        one.weight.data, other.weight.data = flat


@pytest.mark.situation("Bad input", "parameters that share memory", "refused")
@pytest.mark.parametrize("kind", ["same", "turned", "a part"])
def test_weights_in_the_same_memory_stay_shared(kind):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    viewing(model[0], model[1], kind)
    found = find_layers(model)
    assert list(found.layers) == ["2"]
    assert found.skipped["0"] == "its weight lies in the same memory as 1.weight"
    assert found.skipped["1"] == "its weight lies in the same memory as 0.weight"
    lrc.factorize_(model, lrc.allocate(model, 0.9))
    with torch.no_grad():
        model[0].weight.zero_()
    assert not model[1].weight.all()


def test_parts_of_one_memory_that_do_not_overlap_are_no_trap():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    viewing(model[0], model[1], "apart")
    assert list(find_layers(model).layers) == ["0", "1"]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    assert shared_memory(model) == {}
    assert list(find_layers(model).layers) == ["0", "1"]


def test_a_buffer_on_the_memory_of_a_weight_is_named():
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    model.register_buffer("view", model[0].weight.detach()[0])
    assert find_layers(model).skipped == {"0": "its weight lies in the same memory as view"}


def test_what_has_no_memory_of_its_own_shares_none():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("empty", torch.ones(0))
    assert shared_memory(model) == {}


def test_one_parameter_in_two_modules_is_a_tie():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert find_layers(model).skipped["0"] == "its weight is tied to that of 1"


@pytest.mark.situation("Module tricks", "__slots__, __getattr__ and __setattr__ of a module's own", "works")
def test_attribute_methods_of_a_module_s_own_do_not_stand_in_the_way():
    class Picky(Model):
        def __getattr__(self, name):
            if name in ("first", "second"):
                return super().__getattr__(name)
            raise AttributeError(name)

        def __setattr__(self, name, value):
            if name in vars(self).get("_modules", {}):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = Picky()
    allocation = lrc.allocate(model, 0.5)
    assert lrc.factorize_(model, allocation).factorized == ("first", "second")
    assert model(torch.randn(2, 32)).shape == (2, 32)


class Slotted:
    __slots__ = ("head",)

    def __init__(self, head):
        self.head = head


class Holding(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        hold(self)


@pytest.mark.parametrize(
    ("hold", "attribute"),
    [
        (lambda one: setattr(one, "queue", deque([one.layer])), "queue"),
        (lambda one: setattr(one, "slotted", Slotted(one.layer)), "slotted"),
        (lambda one: setattr(one, "turned", one.layer.weight.t()), "turned"),
        (lambda one: setattr(one, "rows", [one.layer.weight.detach()[2:4]]), "rows"),
    ],
    ids=["deque", "slots", "transpose", "part"],
)
def test_layers_in_queues_and_slots_and_views_of_weights_are_found(hold, attribute):
    skipped = lrc.allocate(nn.Sequential(Holding(hold), nn.Linear(32, 32)), 0.7).skipped
    assert skipped["0.layer"].startswith(f"held by the attribute {attribute} of 0 too")


def test_a_layer_that_a_class_holds_is_found():
    class Model(Holding):
        pass

    model = nn.Sequential(Model(lambda one: None), nn.Linear(32, 32))
    Model.shared = [model[0].layer]
    assert lrc.allocate(model, 0.7).skipped["0.layer"].startswith("held by the attribute shared of 0 too")


def test_what_lies_beside_a_weight_in_one_memory_is_no_view_of_it():
    model = nn.Sequential(nn.Linear(32, 32))
    flat = torch.randn(2, 32, 32)
    model[0].weight = nn.Parameter(flat[0])
    model.other = flat[1]
    assert not lrc.allocate(model, 0.7).skipped
