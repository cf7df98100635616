"""Budgets in several units at once: all are kept, the gap is true, and contradictions are told of."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze, survey
from lr_callback.decisions import budgets as solver
from lr_callback.decisions import several
from lr_callback.decisions.budgets import solve_budgets
from lr_callback.decisions.candidates import Candidate, LayerCandidates, cost_in, frontier
from lr_callback.decisions.choices import list_choices
from lr_callback.decisions.leximin import fitting
from lr_callback.decisions.surrogate import ContradictoryError
from lr_callback.model.observe import observe
from lr_callback.model.pricing import Prices
from lr_callback.observation.gallery import layer_numbers
from lr_callback.page.tables import layers

UNITS = ("parameters", "multiply_adds", "bytes")


@st.composite
def problems(draw, most_layers=3):
    """Draw layers with costs in several units that rise with the rank, but not alike, and budgets."""
    layers, units = {}, UNITS[: draw(st.integers(2, 3))]
    for name in "abc"[: draw(st.integers(1, most_layers))]:
        candidates = []
        for slices in (1, 2)[: draw(st.integers(1, 2))]:
            last = draw(st.integers(1, 3))
            errors = sorted(draw(st.lists(st.floats(0.05, 0.95), min_size=last, max_size=last)), reverse=True)
            steps = {unit: draw(st.lists(st.integers(1, 9), min_size=last, max_size=last)) for unit in units}
            costs = {unit: torch.tensor([0, *itertools.accumulate(one)]) for unit, one in steps.items()}
            first, *others = units
            made = Candidate(
                "kernel_in_encoder", slices, 9, torch.tensor([1.0, *errors], dtype=torch.float64), costs[first]
            )
            candidates.append(replace(made, others={unit: costs[unit] for unit in others}))
        layers[name] = LayerCandidates(30, tuple(candidates), others=dict.fromkeys(units[1:], 30))
    budgets = {unit: draw(st.integers(1, 30 * len(layers))) for unit in units}
    return layers, budgets


def every_choice(layers):
    """Return every combination of choices."""
    options = [
        [None, *((one, rank) for one in layer.candidates for rank in range(1, one.last + 1))]
        for layer in layers.values()
    ]
    return [dict(zip(layers, found, strict=True)) for found in itertools.product(*options)]


def spent(layers, choices, units):
    return {
        unit: sum(cost_in(unit, layers[name], choice, position == 0) for name, choice in choices.items())
        for position, unit in enumerate(units)
    }


def keeps(layers, choices, budgets):
    return all(cost <= budgets[unit] for unit, cost in spent(layers, choices, budgets).items())


def errors(choices):
    return [0.0 if choice is None else float(choice[0].errors[choice[1]]) for choice in choices.values()]


OBJECTIVES = {
    "minimax": (lrc.ALDS(), max),
    "squares": (lrc.ALDS(objective="sum"), lambda found: sum(one**2 for one in found)),
    "fourth powers": (lrc.ALDS(objective="sum", power=4), lambda found: sum(one**4 for one in found)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_all_budgets_are_kept_and_no_combination_is_better(objective, problem):
    (layers, budgets), (method, measure) = problem, OBJECTIVES[objective]
    fitting = [choices for choices in every_choice(layers) if keeps(layers, choices, budgets)]
    if not fitting:
        with pytest.raises(ContradictoryError, match="no allocation keeps all of them"):
            solve_budgets(method, layers, budgets)
        return
    found = solve_budgets(method, layers, budgets)
    assert keeps(layers, found.choices, budgets) and list(found.choices) == list(layers)
    best = min(measure(errors(choices)) for choices in fitting)
    assert found.value == pytest.approx(best) == pytest.approx(measure(errors(found.choices)))
    assert found.gap == 0


@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_where_combinations_are_not_listed_the_gap_is_true(problem):
    (layers, budgets), (method, measure) = problem, OBJECTIVES["fourth powers"]
    fitting = [choices for choices in every_choice(layers) if keeps(layers, choices, budgets)]
    if not fitting:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "_closest", lambda problem, prices, bound, *_: (None, bound))
        found = solve_budgets(method, layers, budgets)
    value, best = measure(errors(found.choices)), min(measure(errors(choices)) for choices in fitting)
    assert keeps(layers, found.choices, budgets) and found.value == pytest.approx(value)
    assert value * (1 - found.gap) <= best * (1 + 1e-9) and best <= value * (1 + 1e-12)


@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_layers_count_with_their_weights(problem):
    layers, budgets = problem
    layers = {name: replace(layer, weight=10.0**place) for place, (name, layer) in enumerate(layers.items())}
    fitting = [choices for choices in every_choice(layers) if keeps(layers, choices, budgets)]
    if not fitting:
        return
    found = solve_budgets(lrc.ALDS("frobenius", "loss", power=4), layers, budgets)
    sums = [sum(10**place * error**4 for place, error in enumerate(errors(choices))) for choices in fitting]
    assert found.value == pytest.approx(min(sums)) and found.gap == 0
    assert found.weights == {name: layer.weight for name, layer in layers.items()}


def test_budgets_that_pull_apart_in_a_small_network_are_met_at_the_optimum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))
    seen = observe(model, torch.randn(8, 48), activations=True)
    method = lrc.ALDS(slices=[1, 2])
    analysis = analyze(model, method, prices=[Prices("parameters"), Prices("activation_memory", seen)])
    budget = {"parameters": 0.8, "activation_memory": 1.2}
    found = analysis.allocate(budget)
    dense = {
        unit: sum(cost_in(unit, one, None, unit == "parameters") for one in analysis.layers.values()) for unit in budget
    }
    room = torch.tensor([int(budget[unit] * cost) - cost + dense[unit] for unit, cost in analysis.dense_costs.items()])
    listed = list_choices(analysis.layers, list(budget))
    best = 1.0
    first, second, third = (torch.nonzero(listed.owners == place).flatten() for place in range(3))
    for one in first.tolist():
        pairs = listed.costs[:, second][:, :, None] + listed.costs[:, third][:, None]
        fits = (pairs + listed.costs[:, one, None, None] <= room[:, None, None]).all(0)
        worst = listed.errors[second][:, None].maximum(listed.errors[third]).where(fits, 1.0)
        best = min(best, max(float(worst.min()), float(listed.errors[one])))
    assert found.worst_error == best < 0.55 and found.gap == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(problem=problems())
@settings(max_examples=20, deadline=None)
def test_neither_the_order_of_the_layers_nor_the_number_of_threads_changes_a_choice(objective, problem):
    (layers, budgets), (method, _) = problem, OBJECTIVES[objective]
    if not any(keeps(layers, choices, budgets) for choices in every_choice(layers)):
        return
    threads, found = torch.get_num_threads(), []
    try:
        for number, order in ((1, layers), (2, dict(reversed(layers.items())))):
            torch.set_num_threads(number)
            found.append(solve_budgets(method, order, budgets))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.parametrize("method", [lrc.ALDS(), lrc.LRank()], ids=str)
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_what_is_accepted_before_errors_are_known_is_not_refused_later(method, problem):
    layers, budgets = problem
    try:
        solve_budgets(method, {name: unjudged(layer) for name, layer in layers.items()}, budgets)
    except ContradictoryError:
        return
    assert keeps(layers, solve_budgets(method, layers, budgets).choices, budgets)


@pytest.mark.parametrize("method", [lrc.ALDS(), lrc.ALDS(objective="sum")], ids=["minimax", "sum"])
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_where_nothing_is_certain_what_was_found_by_costs_is_found_again(method, problem):
    layers, budgets = problem
    asked = []

    def only_by_costs(choices, limits):
        asked.append(choices)
        return fitting(choices, limits) if len(asked) == 2 else (None, False)

    if not any(keeps(layers, choices, budgets) for choices in every_choice(layers)):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "fitting", only_by_costs)
        found = solve_budgets(method, layers, budgets)
    assert keeps(layers, found.choices, budgets) and found.gap == 1 and found.value is None


def unjudged(layer):
    """Return a layer as a survey sees it."""
    made = [replace(one, errors=torch.linspace(1, 0, one.last + 1, dtype=torch.float64)) for one in layer.candidates]
    return replace(layer, candidates=tuple(made))


@pytest.mark.parametrize("memory", [1.001, 1.01, 1.1])
@pytest.mark.parametrize("look", [analyze, survey])
def test_where_one_budget_falls_as_the_other_rises_what_keeps_both_is_found(look, memory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.Flatten(), nn.Linear(288, 40)
    )
    model.extend([nn.GELU(), nn.Linear(40, 10)])
    example = torch.randn(4, 3, 8, 8)
    seen = observe(model, example, activations=True)
    analysis = look(model, prices=[Prices("parameters"), Prices("activation_memory", seen)])
    found = analysis.allocate({"parameters": 0.4, "activation_memory": memory})
    assert found.cost <= 0.4 * found.dense_cost
    assert found.others["activation_memory"].cost <= memory * found.others["activation_memory"].dense_cost


@pytest.mark.parametrize("method", [lrc.ALDSK(), lrc.LRank(), lrc.UniformRank(), lrc.ALDSError()], ids=str)
def test_every_rule_keeps_all_budgets(method):
    model, example = network(), torch.randn(2, 8, 9, 9)
    allocation = lrc.allocate(
        model, budget={"parameters": 0.6, "multiply_adds": 0.5}, method=method, example_input=example
    )
    assert allocation.cost <= allocation.budget
    assert allocation.others["multiply_adds"].cost <= allocation.others["multiply_adds"].budget
    assert allocation.cost > 0.4 * allocation.dense_cost, "it spends what it may"


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.Flatten(), nn.Linear(512, 40)
    )


@pytest.mark.parametrize("budget", [(0.5, 0.5), (0.3, 0.9), (0.9, 0.3), (0.4, 0.45)])
@pytest.mark.parametrize("method", [lrc.ALDS(), lrc.ALDS("frobenius", "sum", power=4)], ids=["minimax", "sum"])
def test_what_is_built_costs_what_is_told_in_each_unit(budget, method):
    model, example = network(), torch.randn(2, 8, 9, 9)
    asked = dict(zip(("parameters", "multiply_adds"), budget, strict=True))
    allocation = lrc.allocate(model, budget=asked, method=method, example_input=example)
    before = observe(model, example)
    lrc.factorize_(model, allocation)
    other = allocation.others["multiply_adds"]
    assert sum(parameter.numel() for parameter in model.parameters()) == allocation.cost <= allocation.budget
    assert before.multiply_adds(model) == observe(model, example).multiply_adds(model) == other.cost <= other.budget
    assert other.budget <= budget[1] * other.dense_cost
    assert allocation.gap < 0.2
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    assert f"({other.cost / other.dense_cost:.1%} kept, {budget[1]:.1%} asked)" in allocation.summary()


def test_one_budget_is_a_keep_ratio_of_its_unit():
    model = network()
    found, wanted = lrc.allocate(model, budget={"bytes": 0.5}), lrc.allocate(model, 0.5, cost="bytes")
    assert found == wanted and found.others == {}


def test_a_second_budget_that_binds_nothing_changes_nothing():
    model, example = network(), torch.randn(2, 8, 9, 9)
    alone = lrc.allocate(model, 0.3)
    both = lrc.allocate(model, budget={"parameters": 0.3, "multiply_adds": 1.0}, example_input=example)
    assert both.layers == alone.layers and both.gap == 0


def test_overridden_layers_count_in_each_unit():
    model, example = network(), torch.randn(2, 8, 9, 9)
    budget = {"parameters": 0.5, "multiply_adds": 0.5}
    allocation = lrc.allocate(model, budget=budget, overrides={"2": {"rank": 3}}, example_input=example)
    assert allocation.layers["2"].rank == 3
    before = observe(model, example)
    lrc.factorize_(model, allocation)
    assert before.multiply_adds(model) == allocation.others["multiply_adds"].cost
    assert sum(parameter.numel() for parameter in model.parameters()) == allocation.cost


@pytest.mark.parametrize("look", [analyze, survey])
@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            {"parameters": 0.9, "multiply_adds": 0.01},
            r"`budget`: 0\.9 of parameters, 0\.01 of multiply-adds: no allocation keeps all of them\. Raise "
            r"one of them; with the same layers each alone can go down to 0\.\d+ of parameters, 0\.\d+ of "
            r"multiply-adds\.",
        ),
        ({"parameters": 0.001, "multiply_adds": 0.9}, "the budget must be at least"),
        ({"parameters": 0.5}, r"`budget` must be in the units that were analysed, \['parameters', 'multiply_adds'\]"),
        (0.5, "`budget` must be in the units that were analysed"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_with_weights_and_without(look, budget, text):
    model = network()
    seen = observe(model, torch.randn(2, 8, 9, 9))
    analysis = look(model, prices=[Prices("parameters"), Prices("multiply_adds", seen)])
    with pytest.raises(ValueError, match=text):
        analysis.allocate(budget)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": {}}, "`budget` must map units to fractions to keep, such as"),
        (
            {"budget": {"watts": 0.5}},
            "`budget` must map units .* parameters, multiply_adds, bytes, latency, activation_memory; got",
        ),
        ({"budget": 0.5}, "`budget` must map units"),
        ({"budget": {"bytes": 0}}, r"`budget`: the fraction of bytes to keep must be a number in \(0, 1\], got 0"),
        ({"budget": {"bytes": True}}, r"the fraction of bytes to keep must be a number in \(0, 1\], got True"),
        ({"budget": {"bytes": 0.5}, "cost": "bytes"}, "`cost` is the unit of `keep_ratio`; a `budget` names its own"),
        (
            {"budget": {"bytes": 0.5}, "keep_ratio": 0.5},
            "Only one of .* can be asked for, got `keep_ratio` and `budget`",
        ),
        ({"max_error": 0.5, "keep_ratio": 0.5}, "Only one of .* can be asked for, got `keep_ratio` and `max_error`"),
        ({"max_error": 0}, r"`max_error` must be a number in \(0, 1\], the largest relative error of a layer, got 0"),
        ({"max_error": "small"}, r"`max_error` must be a number in \(0, 1\], .* got 'small'"),
    ],
)
def test_goals_that_are_none_are_refused_by_function_and_callback(options, text):
    with pytest.raises(ValueError, match=text):
        lrc.allocate(network(), **options)
    with pytest.raises(ValueError, match=text):
        lrc.LowRankCompression(**options)


@pytest.mark.parametrize("method", [lrc.ALDS(), lrc.ALDS("frobenius", "sum"), lrc.ALDS(rank_multiple=4), lrc.ALDSK()])
@pytest.mark.parametrize("error", [0.05, 0.3, 0.7, 1.0])
def test_the_smallest_model_within_an_error_is_taken(method, error):
    model = network()
    allocation = lrc.allocate(model, max_error=error, method=method)
    assert allocation.worst_error <= error and allocation.max_error == error
    assert allocation.budget == allocation.cost and allocation.keep_ratio == allocation.cost / allocation.dense_cost
    for name, layer in analyze(model, method).layers.items():
        edge, choice = frontier(layer, method.rank_multiple), allocation.layers[name]
        cheapest = min(cost for cost, own in zip(edge.costs, edge.errors, strict=True) if own <= error)
        assert cheapest == (layer.dense_cost if choice is None else choice.cost)
    assert lrc.Allocation.from_json(allocation.to_json()) == allocation
    assert f"error {allocation.worst_error:.3f}, at most {error:g} asked" in allocation.summary()


def test_a_smaller_error_never_gives_a_smaller_model():
    model = network()
    costs = [lrc.allocate(model, max_error=error).cost for error in (1.0, 0.6, 0.4, 0.2, 0.1, 0.01)]
    assert costs == sorted(costs) and costs[0] < costs[-1]


def test_the_order_of_the_units_is_free_once_they_were_analysed():
    model = network()
    seen = observe(model, torch.randn(2, 8, 9, 9))
    analysis = analyze(model, prices=[Prices("parameters"), Prices("multiply_adds", seen)])
    one, other = ({"parameters": 0.5, "multiply_adds": 0.4}, {"multiply_adds": 0.4, "parameters": 0.5})
    assert analysis.allocate(one) == analysis.allocate(other)
    assert analysis.smallest_in("parameters") == analysis.smallest_cost == analyze(model).smallest_cost
    alone = analyze(model, prices=Prices("multiply_adds", seen))
    assert analysis.smallest_in("multiply_adds") == alone.smallest_cost


def test_what_gains_in_one_unit_alone_may_be_chosen():
    """An embedding looks up: it multiplies nothing, and its factors do."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.body = nn.Embedding(300, 32), nn.Linear(32, 32)

        def forward(self, tokens):
            return self.body(self.body(self.body(self.table(tokens)))).relu()

    model, tokens = Text(), torch.randint(300, (4, 9))
    budget = {"parameters": 0.3, "multiply_adds": 1.0}
    allocation = lrc.allocate(model, budget=budget, embeddings=True, example_input=tokens)
    assert allocation.layers["table"] is not None and allocation.cost <= 0.3 * allocation.dense_cost
    before = observe(model, tokens)
    lrc.factorize_(model, allocation)
    assert before.multiply_adds(model) == allocation.others["multiply_adds"].cost <= before.dense_multiply_adds


def test_a_budget_that_is_used_up_by_what_is_fixed_is_kept_if_it_can_be():
    model = network()
    pins = {"*": {"rank": 2}}
    allocation = lrc.allocate(model, 0.99, overrides=pins)
    ratio = allocation.cost / allocation.dense_cost
    found = lrc.allocate(model, budget={"parameters": ratio, "bytes": 1.0}, overrides=pins)
    assert found.layers == allocation.layers and found.gap == 0
    whole = lrc.allocate(model, budget={"parameters": 1.0, "bytes": 1.0}, overrides={"*": {"keep_ratio": 1.0}})
    assert whole.cost == whole.dense_cost and not whole.factorized
    with pytest.raises(ValueError, match="the budget must be at least"):
        lrc.allocate(model, budget={"parameters": ratio * 0.99, "bytes": 1.0}, overrides=pins)


def test_an_overridden_layer_may_err_by_more_than_is_asked_of_the_others_and_the_summary_says_so():
    allocation = lrc.allocate(network(), max_error=0.2, overrides={"4": {"rank": 1}})
    assert allocation.layers["4"].relative_error > 0.2
    others = [one.relative_error for name, one in allocation.factorized.items() if name != "4"]
    assert others and max(others) <= 0.2
    assert "at most 0.2 asked besides overrides" in allocation.summary()


class Half(nn.Module):
    """Runs one of its two layers."""

    def __init__(self):
        super().__init__()
        self.unused, self.used = nn.Linear(192, 64), nn.Linear(64, 192)

    def forward(self, inputs):
        return self.used(inputs)


@pytest.mark.parametrize(
    "budget",
    [{"parameters": 0.4, "multiply_adds": 1.0}, {"multiply_adds": 0.3, "parameters": 0.4}],
    ids=["parameters first", "multiply_adds first"],
)
def test_a_layer_that_a_run_does_not_use_is_factorized_for_what_it_holds(budget):
    model, example = Half(), torch.zeros(4, 64)
    found = lrc.allocate(model, budget=budget, example_input=example)
    assert set(found.factorized) == {"unused", "used"}
    lrc.factorize_(model, found)
    kept = {"parameters": sum(one.numel() for one in model.parameters()) / (2 * 192 * 64 + 192 + 64)}
    kept["multiply_adds"] = observe(model, example).multiply_adds(model) / (4 * 192 * 64)
    assert all(kept[unit] <= ratio for unit, ratio in budget.items())


def test_what_costs_nothing_in_the_first_unit_is_written_shown_and_drawn():
    budget = {"multiply_adds": 0.9, "parameters": 0.4}
    found = lrc.allocate(Half(), budget=budget, example_input=torch.zeros(4, 64))
    assert found.layers["unused"].kept is None and found.layers["used"].kept < 1
    assert lrc.Allocation.from_json(found.to_json()) == found
    (row,) = [line for line in str(found).splitlines() if line.startswith("unused")]
    assert row.split()[-1] == "-"
    numbers = layer_numbers(found, found.curves())
    assert "compression/layers/unused/error" in numbers and "compression/layers/unused/kept" not in numbers
    _, axes = lrc.plot_allocation(found)
    assert "unused" not in [label.get_text() for label in axes.get_yticklabels()]
    (cells,) = re.findall(r"<tr[^>]*><th[^>]*>unused</th>(.*?)</tr>", str(layers(found)))
    assert cells.endswith("<td>\N{EN DASH}</td>")


@pytest.mark.parametrize("method", [lrc.UniformRank(), lrc.ALDSSimple(), lrc.ALDSError(), lrc.ALDS()], ids=repr)
def test_activation_memory_goes_down_to_the_dense_network_s_whatever_the_method(method):
    model = network()
    seen = observe(model, torch.randn(2, 8, 9, 9), activations=True)
    analysis = analyze(model, method, prices=[Prices("parameters"), Prices("activation_memory", seen)])
    assert analysis.smallest_in("activation_memory") == analysis.dense_costs["activation_memory"]
    assert analysis.allocate({"parameters": 1.0, "activation_memory": 1.0}).factorized == {}


@pytest.mark.parametrize("objective", ["minimax", "sum"])
@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 100])
def test_layers_too_small_for_a_multiple_of_ranks_stay_dense(objective, multiple):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    method, budget = lrc.ALDS(objective=objective, rank_multiple=multiple), {"parameters": 0.6, "bytes": 0.6}
    if multiple == 100:
        with pytest.raises(ValueError, match="the budget must be at least"):
            lrc.allocate(model, budget=budget, method=method)
        return
    found, alone = lrc.allocate(model, budget=budget, method=method), lrc.allocate(model, 0.6, method=method)
    assert found.layers == alone.layers and found.gap == 0
    assert all(one.rank * one.num_slices % multiple == 0 for one in found.factorized.values())


@pytest.mark.parametrize("look", [analyze, survey])
@pytest.mark.parametrize("units", [("parameters", "multiply_adds"), ("multiply_adds", "parameters")])
def test_an_override_of_a_layer_that_costs_nothing_in_a_unit_is_a_share_of_one_in_which_it_does(look, units):
    model = Half()
    seen = observe(model, torch.zeros(4, 64))
    found = look(model, prices=[Prices(unit, seen) for unit in units], overrides={"unused": {"keep_ratio": 0.5}})
    candidate, rank = found.pinned["unused"]
    held = candidate.costs if units[0] == "parameters" else candidate.others["parameters"]
    assert 0.45 * (192 * 64 + 64) < int(held[rank]) <= 0.5 * (192 * 64 + 64)


@pytest.mark.parametrize("units", [("parameters", "multiply_adds"), ("multiply_adds", "parameters")])
def test_an_override_that_such_a_layer_cannot_meet_is_refused(units):
    seen = observe(Half(), torch.zeros(4, 64))
    with pytest.raises(
        ValueError, match=r"unused cannot be as small as keep_ratio=0\.001; its smallest form takes 0\.0"
    ):
        survey(Half(), prices=[Prices(unit, seen) for unit in units], overrides={"unused": {"keep_ratio": 0.001}})


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Embedding(500, 64)), lambda: nn.EmbeddingBag(500, 64)])
@pytest.mark.parametrize("rows", [0, 4])
def test_multiply_adds_that_a_run_does_not_take_are_refused_beside_others(make, rows):
    words = torch.zeros(rows, 3, dtype=torch.long)
    text = r"`budget`: a run .* must take multiply-adds for .* and takes none\. Leave this unit out, or give"
    with pytest.raises(ValueError, match=text):
        lrc.allocate(make(), budget={"parameters": 0.5, "multiply_adds": 0.5}, embeddings=True, example_input=words)


def test_a_layer_whose_weight_a_run_reads_is_left_out_whatever_else_is_paid_for():
    class Reads(Half):
        def forward(self, inputs):
            return self.used(inputs @ self.unused.weight @ self.unused.weight.T)

    budget = {"parameters": 0.9, "multiply_adds": 0.9}
    found = lrc.allocate(Reads(), budget=budget, example_input=torch.zeros(4, 64))
    assert set(found.factorized) == {"used"} and "read directly" in found.skipped["unused"]
