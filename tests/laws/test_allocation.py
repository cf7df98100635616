"""Laws 3 and 9: an allocation keeps its budget, is the best there is, and costs what is built."""

import random
import subprocess
import sys
from itertools import pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.common.parallel import workers
from lr_callback.decisions.candidates import Candidate, LayerCandidates
from lr_callback.decisions.costs import CountedCost
from lr_callback.decisions.methods import cost_of
from lr_callback.layers.layer_types import build
from lr_callback.mathematics.errors import ERRORS
from lr_callback.mathematics.folding import FOLDINGS, Geometry, fold, slice_counts, unfold_decoder, unfold_encoder
from lr_callback.mathematics.truncation import truncate

METHODS = [
    lrc.ALDS,
    lrc.UniformRank,
    lrc.SingularValueThreshold,
    lrc.EnergyThreshold,
    lrc.LRank,
    lrc.ALDSSimple,
    lrc.ALDSError,
    lrc.ALDSK,
]

Layers = dict[str, LayerCandidates]


@st.composite
def few_choices(draw) -> Layers:
    """Draw one to three layers of few choices, each error of the whole case different from all others."""
    values = iter(draw(st.lists(st.floats(0.01, 1.4), min_size=24, max_size=24, unique=True)))
    layers = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        fixed, dense, candidates = draw(st.integers(0, 3)), draw(st.integers(30, 60)), []
        for num_slices in range(1, draw(st.integers(1, 2)) + 1):
            last, per_rank = draw(st.integers(1, 3)), draw(st.integers(2, 8))
            curve = sorted((next(values) for _ in range(last + 1)), reverse=True)
            errors = torch.tensor(curve, dtype=torch.float64)
            costs = fixed + per_rank * torch.arange(last + 1)
            candidates.append(Candidate("kernel_in_encoder", num_slices, last, errors, costs))
        layers[name] = LayerCandidates(dense, tuple(candidates))
    return layers


@st.composite
def budgets(draw, layers: Layers) -> int:
    return draw(st.integers(lrc.ALDS().smallest_cost(layers), sum(layer.dense_cost for layer in layers.values())))


def every_choice(layer: LayerCandidates) -> list[tuple[int, float]]:
    ranks = [(one, rank) for one in layer.candidates for rank in range(1, one.last + 1)]
    return [(layer.dense_cost, 0.0), *((one.cost(rank), one.errors[rank].item()) for one, rank in ranks)]


def vector(choices) -> list[float]:
    return sorted((0.0 if c is None else c[0].errors[c[1]].item() for c in choices.values()), reverse=True)


def total(layers: Layers, choices) -> int:
    return sum(cost_of(layers[name], choice) for name, choice in choices.items())


def small_network(order: int = 0, bias: bool = True) -> nn.ModuleDict:
    """Build layers of every kind; `order` shuffles them, the weights of each stay the same."""
    kinds = {
        "stem": lambda: nn.Conv2d(3, 16, 3, bias=bias),
        "wide": lambda: nn.Conv2d(48, 24, (3, 5), stride=2, bias=bias),
        "point": lambda: nn.Conv2d(12, 36, 1, bias=bias),
        "prime": lambda: nn.Conv2d(13, 17, (1, 7), bias=bias),
        "head": lambda: nn.Linear(60, 20, bias=bias),
    }
    made = {}
    for seed, (name, make) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        made[name] = make()
    names = list(made)
    random.Random(order).shuffle(names)
    return nn.ModuleDict({name: made[name] for name in names})


@given(st.data())
def test_the_errors_equal_those_of_the_best_of_all_combinations(data):
    layers = data.draw(few_choices())
    budget = data.draw(budgets(layers))
    choices = lrc.ALDS().choose(layers, budget)
    assert total(layers, choices) <= budget
    combinations = product(*map(every_choice, layers.values()))
    fitting = [chosen for chosen in combinations if sum(cost for cost, _ in chosen) <= budget]
    best = min(sorted((error for _, error in chosen), reverse=True) for chosen in fitting)
    assert vector(choices) == best


@given(st.data())
def test_a_larger_budget_never_gives_a_larger_worst_error_nor_passes_the_budget(data):
    layers = data.draw(few_choices())
    smallest, dense = lrc.ALDS().smallest_cost(layers), sum(layer.dense_cost for layer in layers.values())
    solved = [(budget, lrc.ALDS().choose(layers, budget)) for budget in range(smallest, dense + 1)]
    assert all(total(layers, choices) <= budget for budget, choices in solved)
    assert all(vector(later)[0] <= vector(earlier)[0] for (_, earlier), (_, later) in pairwise(solved))


@given(st.data())
def test_the_order_of_the_layers_changes_no_choice(data):
    layers = data.draw(few_choices())
    budget = data.draw(budgets(layers))
    shuffled = dict(data.draw(st.permutations(list(layers.items()))))
    assert lrc.ALDS().choose(layers, budget) == lrc.ALDS().choose(shuffled, budget)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.__name__)
def analysis(request) -> lrc.Analysis:
    return lrc.analyze(small_network(), request.param())


@given(share=st.floats(0, 1))
def test_every_method_keeps_every_budget_that_it_can_reach(analysis, share):
    low, high = analysis.reachable
    allocation = analysis.allocate(low + share * (high - low))
    assert allocation.cost <= allocation.budget
    kept = sum(analysis.layers[n].dense_cost if one is None else one.cost for n, one in allocation.layers.items())
    assert allocation.cost == analysis.fixed_cost + kept


@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_in_a_network_a_larger_budget_never_gives_a_larger_worst_error(analysis, shares):
    low, high = analysis.reachable
    less, more = (analysis.allocate(low + share * (high - low)) for share in sorted(shares))
    # True of the scalar rules too: with more generosity no layer's rank falls, and no error rises with rank.
    assert more.worst_error <= less.worst_error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep_ratio", [0.3, 0.6])
def test_the_order_of_the_modules_changes_no_factorization(keep_ratio, method):
    allocations = [lrc.allocate(small_network(order), keep_ratio, method=method()) for order in (0, 1, 2)]
    assert len({tuple(allocation.layers) for allocation in allocations}) == 3
    for other in allocations[1:]:
        assert other.layers == allocations[0].layers and other.cost == allocations[0].cost


@pytest.mark.parametrize("error", ERRORS)
def test_the_number_of_threads_changes_no_bit(error):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(96, 160, 3), nn.Conv2d(160, 48, (1, 3)), nn.Linear(256, 700), nn.Linear(700, 90))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(lrc.analyze(network, lrc.ALDS(error=error, max_slices=8)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*(analysis.layers.values() for analysis in found), strict=True):
        assert len(one.candidates) > 3
        pairs = list(zip(one.candidates, two.candidates, strict=True))
        assert all(torch.equal(a.errors, b.errors) for a, b in pairs)
    assert found[0].allocate(0.4) == found[1].allocate(0.4)


def test_processes_with_other_numbers_of_threads_print_the_same_allocation():
    code = (
        "import sys, torch, lr_callback as lrc\n"
        "torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "network = torch.nn.Sequential(torch.nn.Conv2d(64, 96, 3), torch.nn.Linear(700, 90))\n"
        "print(lrc.allocate(network, 0.4, method=lrc.ALDS(error='operator')).to_json())\n"
    )
    run = [subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True) for n in "12"]
    assert run[0].stdout == run[1].stdout
    assert lrc.Allocation.from_json(run[0].stdout).factorized


@given(st.data())
@settings(max_examples=30)
def test_the_cost_in_parameters_is_the_number_of_entries_of_the_factors(data):
    kernel = data.draw(st.sampled_from([(), (1, 1), (3, 3), (2, 5), (1, 3)]))
    geometry = Geometry(data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 3, 7, 8, 12])), kernel)
    folding = data.draw(st.sampled_from(list(FOLDINGS)))
    num_slices = data.draw(st.sampled_from(slice_counts(geometry.in_channels)))
    rank = data.draw(st.integers(1, geometry.full_rank(folding, num_slices)))
    weight = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(prod(geometry.weight_shape)))
    with workers() as crew:
        left, right = truncate(fold(weight, folding, num_slices), rank, crew)
    encoder, decoder = unfold_encoder(right, geometry, folding), unfold_decoder(left, geometry, folding)
    cost = CountedCost(geometry, bias=geometry.out_channels)
    assert cost.factorized(folding, num_slices, rank) == encoder.numel() + decoder.numel() + geometry.out_channels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 0.8])
def test_reported_costs_are_the_parameters_of_the_modules_that_are_built(keep_ratio, bias):
    network = small_network(bias=bias)
    allocation = lrc.allocate(network, keep_ratio, method=lrc.ALDS(foldings=list(FOLDINGS)))
    assert allocation.factorized
    for name, choice in allocation.factorized.items():
        dense = network[name]
        module = build(dense, choice)
        assert choice.dense_cost == sum(p.numel() for p in dense.parameters())
        assert choice.cost == sum(p.numel() for p in module.parameters())
    lrc.factorize_(network, allocation)
    assert allocation.cost == sum(p.numel() for p in network.parameters())
