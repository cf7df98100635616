"""A unit of one's own: asked of modules without values, checked before anything is done."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.layers import FactorizedLayer
from lr_callback.units.own_cost import OwnCost, read_cost


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def energy(module):
    """Return the parameters, in a memory that is read in lines of 16."""
    return sum(-(-parameter.numel() // 16) for parameter in module.parameters())


def test_a_budget_is_kept_and_what_is_told_is_what_is_built():
    model = network()
    before = energy(model)
    allocation = lrc.allocate(model, 0.4, cost=energy)
    assert allocation.unit.endswith("test_own_cost.energy") and allocation.dense_cost == before
    lrc.factorize_(model, allocation)
    assert energy(model) == allocation.cost <= 0.4 * before
    assert f"{before:,} -> {allocation.cost:,} energy (" in allocation.summary()
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    again = lrc.allocate(model, 0.3, cost=energy)
    assert again.dense_cost == before
    lrc.factorize_(model, again)
    assert energy(model) == again.cost


def test_parameters_as_a_cost_of_ones_own_give_the_ranks_of_parameters():
    own, known = lrc.allocate(network(), 0.4, cost=lambda module: size(module) + 0), lrc.allocate(network(), 0.4)
    assert [(one.rank, one.num_slices, one.cost) for one in own.factorized.values()] == [
        (one.rank, one.num_slices, one.cost) for one in known.factorized.values()
    ]
    assert own.unit.endswith(".<lambda>") and lrc.Allocation.from_dict(own.to_dict()) == own


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _ranks(module):
    """Return the ranks that a module has in it."""
    return [one.rank for one in module.modules() if isinstance(one, FactorizedLayer)]


def test_equal_layers_are_asked_once_and_never_for_values():
    asked = []

    def counted(module):
        asked.append(module)
        return size(module)

    model = network()
    lrc.allocate(model, 0.5, cost=counted, method=lrc.ALDS(slices=[1]))
    linear = [one for one in asked if one is not model and not isinstance(one, nn.ModuleList)]
    assert len(linear) == 2 + 64 + 8  # of each of both sizes the dense one, and every rank
    assert all(parameter.is_meta for one in asked if one is not model for parameter in one.parameters())


def test_a_rank_that_costs_no_less_is_not_chosen_whatever_lies_beyond_it():
    def blocks(module):
        """Cost as much as the dense layer does, but at ranks that are multiples of 8."""
        wide = sum(one.weight.shape[0] % 8 for one in module.modules() if isinstance(one, nn.Linear))
        return size(module) + 10_000 * wide

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for method in (lrc.ALDS(slices=[1]), lrc.ALDS("frobenius", "sum", slices=[1])):
        allocation = lrc.allocate(model, 0.8, cost=blocks, method=method)
        assert all(one.rank % 8 == 0 and one.cost < one.dense_cost for one in allocation.factorized.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, r"0, dense: must cost 0 or more, got -1"),
        (float("nan"), r"must cost a number: finite, .* got nan"),
        (float("inf"), r"must cost a number: finite, .* got inf"),
        (1.5, r"must cost a whole number of units, choose a smaller unit, got 1\.5"),
        (2**60, r"must cost less than 2 \*\* 53 units, choose a larger unit"),
        (None, r"must cost a number: .* got None"),
        ("3", r"must cost a number: .* got '3'"),
        (True, r"must cost a number: .* got True"),
        (torch.tensor(3), r"must cost a number: finite, and a plain one \(of a tensor `\.item\(\)`\), got tensor\(3\)"),
    ],
    ids=str,
)
def test_what_is_no_cost_is_refused_with_the_layer_and_the_value(value, text):
    def odd(module):
        return value if isinstance(module, nn.Linear) else size(module)

    with pytest.raises(ValueError, match=rf"^cost=.*odd: {text if text.startswith('0') else '0, dense: ' + text}"):
        lrc.allocate(network(), 0.5, cost=odd)


def test_a_form_that_has_no_cost_is_named():
    def only_dense(module):
        return -2 if getattr(module, "rank", 0) == 3 else size(module)

    text = r"only_dense: 0 with 1 slice\(s\) of rank 3, kernel_in_encoder: must cost 0 or more, got -2"
    with pytest.raises(ValueError, match=text):
        lrc.allocate(network(), 0.5, cost=only_dense)


def test_whole_floats_are_costs():
    assert (
        lrc.allocate(network(), 0.5, cost=lambda module: float(size(module))).cost == lrc.allocate(network(), 0.5).cost
    )


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            lambda module: size(module) + 5,
            r"layers must cost together what each of them does, 8,330 for 0 and 2, got 8,325",
        ),
        (lambda module: size(module) ** 2, r"what each of them does, 34,611,200 for 0 and 2, got 69,222,400"),
        (lambda module: max(map(torch.numel, module.parameters())), r"does, 8,192 for 0 and 2, got 4,096"),
        (
            lambda module: 0 if isinstance(module, nn.Sequential) else size(module),
            r"cost at least what its layers cost",
        ),
        (
            lambda module: size(module) + 500 * any(isinstance(one, FactorizedLayer) for one in module.modules()),
            r"layers of rank 1 must cost together what each of them does, 1,384 for 0 and 2, got 884 for nn.ModuleList",
        ),
        (
            lambda module: size(module) + sum(_ranks(module)) // 40,
            r"layers of half their rank must cost together what each of them does, 8,320 for 0 and 2, got 8,321",
        ),
        (lambda module: 0, r"the model must cost more than 0, to keep a fraction of it, got 0"),
    ],
    ids=["constant", "square", "largest", "model", "factorized", "middle", "nothing"],
)
def test_a_cost_that_does_not_add_up_is_refused_with_the_layers(function, text):
    with pytest.raises(ValueError, match=text):
        lrc.allocate(network(), 0.5, cost=function)


def test_what_a_function_raises_passes_through_with_a_note():
    def broken(module):
        if isinstance(module, nn.Linear) and module.out_features == 8:
            raise KeyError("no such part")
        return size(module)

    with pytest.raises(KeyError, match="no such part") as caught:
        lrc.allocate(network(), 0.5, cost=broken)
    notes = getattr(caught.value, "__notes__", [" for 4, dense."])  # Python 3.10 has none
    assert " for 4, dense." in "".join(notes)


@pytest.mark.parametrize("cost", ["energie", "no.such_function", "math.no_such", 5, nn.Linear, None], ids=str)
@pytest.mark.parametrize(
    "take", [lambda cost: lrc.allocate(network(), 0.5, cost=cost), lambda cost: lrc.LowRankCompression(cost=cost)]
)
def test_what_is_no_function_is_refused(cost, take):
    with pytest.raises(ValueError, match=r"`cost` must be one of .* or a function of a module"):
        take(cost)


def test_a_budget_in_a_unit_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="a cost of your own can be asked for as `cost` alone, with `keep_ratio`"):
        lrc.allocate(network(), budget={"parameters": 0.5, energy: 0.5})


def test_names_are_paths():
    class Table:
        def __call__(self, module):
            return size(module)

    names = [read_cost(one).name for one in (energy, partial(energy), Table(), torch.numel)]
    assert [name.rpartition(".")[2] for name in names] == ["energy", "energy", "Table", "numel"]
    assert repr(OwnCost(energy)) == names[0]


def test_a_file_of_another_unit_is_refused_and_one_of_a_path_is_not():
    written = lrc.allocate(network(), 0.5, cost=energy).to_dict()
    assert lrc.Allocation.from_dict({**written, "unit": "a.b"}).unit == "a.b"
    for unit in ("energy", "", ".", "a.", "a. b", "a.1", "a.<other>"):
        with pytest.raises(ValueError, match=r"`unit` must be one of .*, or the path of a function, got "):
            lrc.Allocation.from_dict({**written, "unit": unit})


def test_callbacks_with_a_cost_of_ones_own_are_copied_and_pickled():
    callback = lrc.LowRankCompression(0.5, cost=energy)
    for one in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        (unit,) = one._counting.units
        assert unit.name.endswith(".energy") and unit(nn.Linear(4, 4)) == 2


def test_marks_of_ones_own_on_a_layer_are_seen_and_keep_layers_apart():
    model = network()
    model[0].price, model[2].price = 1, 2

    def priced(module):
        return sum(size(one) * getattr(one, "price", 1) for one in module.modules() if not list(one.children()))

    assert lrc.allocate(model, 0.9, cost=priced).dense_cost == size(model) + size(model[2])
    model[0].table = torch.zeros(2000)  # no plain value
    assert OwnCost(priced).of_layer(model[0]).dense == size(model[0])
