"""Candidates and frontiers against a search over every folding, number of slices and rank."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lr_callback.decisions.candidates import Candidate, Frontier, LayerCandidates, frontier, layer_candidates
from lr_callback.decisions.costs import CountedCost
from lr_callback.mathematics.folding import FOLDINGS, Geometry, slice_counts

NAMES = list(FOLDINGS)
SIZES = [(5, 12, ()), (16, 12, (3, 3)), (7, 48, (1, 1)), (9, 7, (1, 5)), (1, 1, ())]
GEOMETRIES = [Geometry(*size) for size in SIZES]


def falling(folding: str, last: dict[int, int]) -> dict[int, Tensor]:
    return {count: torch.linspace(1, 0.1, rank + 1, dtype=torch.float64) for count, rank in last.items()}


def random_layer(seed: int, candidates: int = 4, steps: int = 12) -> LayerCandidates:
    """Draw curves of few distinct values, so that costs and errors often coincide."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for index in range(candidates):
        drawn = torch.randint(0, 9, (steps,), generator=random).sort(descending=True).values / 8
        per_rank = int(torch.randint(2, 8, (1,), generator=random))
        found.append(
            Candidate("kernel_in_encoder", index + 1, steps, drawn.double(), 3 + per_rank * torch.arange(steps))
        )
    return LayerCandidates(dense_cost=90, candidates=tuple(found))


def every_choice(layer: LayerCandidates, rank_multiple: int) -> list[tuple[int, float]]:
    choices = [(layer.dense_cost, 0.0)]
    for one in layer.candidates:
        ranks = [rank for rank in range(1, one.last + 1) if rank % rank_multiple == 0]
        choices += [(one.cost(rank), one.errors[rank].item()) for rank in ranks]
    return choices


def unbeaten(choices: list[tuple[int, float]]) -> list[tuple[int, float]]:
    def beaten(mine: tuple[int, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in choices)

    return sorted({choice for choice in choices if not beaten(choice)})


def pairs(edge: Frontier) -> list[tuple[int, float]]:
    return list(zip(edge.costs, edge.errors, strict=True))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [0, 3])
def test_candidates_are_all_that_have_a_rank_below_the_dense_cost(geometry, bias):
    cost = CountedCost(geometry, bias)
    layer = layer_candidates(cost, NAMES, slice_counts(geometry.in_channels), falling)
    listed = {(one.folding, one.num_slices): one for one in layer.candidates}
    assert len(listed) == len(layer.candidates)
    assert layer.dense_cost == cost.dense
    seen = set()
    for folding, count in product(NAMES, slice_counts(geometry.in_channels)):
        matrices = (geometry.matrix_shape(folding, count), geometry.decoder_kernel(folding))
        full = geometry.full_rank(folding, count)
        ranks = [rank for rank in range(1, full + 1) if cost.factorized(folding, count, rank) < cost.dense]
        wanted = bool(ranks) and (count, *matrices) not in seen
        seen.add((count, *matrices))
        assert ((folding, count) in listed) == wanted
        if wanted:
            one = listed[folding, count]
            assert (one.last, one.full_rank) == (ranks[-1], full)
            assert [one.cost(rank) for rank in ranks] == [cost.factorized(folding, count, rank) for rank in ranks]


def test_only_the_named_numbers_of_slices_are_tried():
    layer = layer_candidates(CountedCost(Geometry(64, 48, (3, 3))), NAMES[:1], [1, 2, 4], falling)
    assert [one.num_slices for one in layer.candidates] == [1, 2, 4]


def test_only_the_named_foldings_are_tried_in_their_order():
    layer = layer_candidates(CountedCost(Geometry(64, 48, (3, 3))), [NAMES[2], NAMES[0]], [1], falling)
    assert [one.folding for one in layer.candidates] == [NAMES[2], NAMES[0]]


def test_errors_are_asked_for_up_to_the_last_rank_worth_having():
    asked = {}

    def curves(folding: str, last: dict[int, int]) -> dict[int, Tensor]:
        asked[folding] = dict(last)
        return falling(folding, last)

    layer_candidates(CountedCost(Geometry(10, 12)), NAMES, slice_counts(12), curves)
    # Cost of a rank: 12 + 10 k against 120 dense; strictly below: k=1: 5, 2: 3, 3: 2, 4: 2, 6: 1, 12: none.
    assert asked == {"kernel_in_encoder": {1: 5, 2: 3, 3: 2, 4: 2, 6: 1}}


def test_a_layer_too_small_to_gain_has_no_candidate_and_asks_for_no_error():
    def curves(folding: str, last: dict[int, int]) -> dict[int, Tensor]:
        raise AssertionError("nothing to compute")

    layer = layer_candidates(CountedCost(Geometry(1, 64)), NAMES, slice_counts(64), curves)
    assert layer == LayerCandidates(64, ())
    assert pairs(frontier(layer)) == [(64, 0.0)] and frontier(layer).choices == [None]


def test_an_unknown_folding_is_refused():
    with pytest.raises(ValueError, match=r"`folding` must be one of .*, got 'diagonal'"):
        layer_candidates(CountedCost(Geometry(8, 8, (3, 3))), ["diagonal"], [1], falling)


@pytest.mark.parametrize("rank_multiple", [1, 2, 4, 8, 100])
@pytest.mark.parametrize("seed", range(12))
def test_the_frontier_holds_exactly_what_no_other_choice_beats(seed, rank_multiple):
    layer = random_layer(seed)
    edge = frontier(layer, rank_multiple)
    assert pairs(edge) == unbeaten(every_choice(layer, rank_multiple))


@pytest.mark.parametrize("rank_multiple", [1, 2, 6])
@pytest.mark.parametrize("seed", range(6))
def test_every_choice_on_the_frontier_has_its_own_cost_and_error(seed, rank_multiple):
    layer = random_layer(seed)
    edge = frontier(layer, rank_multiple)
    for cost, error, choice in zip(edge.costs, edge.errors, edge.choices, strict=True):
        if choice is None:
            assert (cost, error) == (layer.dense_cost, 0.0)
        else:
            candidate, rank = choice
            assert (cost, error) == (candidate.cost(rank), candidate.errors[rank].item())
            assert any(candidate is one for one in layer.candidates)
            assert rank % rank_multiple == 0


def test_equal_choices_go_to_the_candidate_listed_first():
    curve = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    twins = [Candidate(name, 1, 4, curve, 10 * torch.arange(3)) for name in NAMES]
    for ordered in (twins, twins[::-1]):
        edge = frontier(LayerCandidates(100, tuple(ordered)))
        assert [choice and choice[0].folding for choice in edge.choices] == [ordered[0].folding] * 2 + [None]


def test_a_factorization_without_error_beats_the_dense_layer():
    exact = Candidate("kernel_in_encoder", 1, 4, torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0, 10]))
    edge = frontier(LayerCandidates(100, (exact,)))
    assert (edge.costs, edge.errors, len(edge.choices)) == ([10], [0.0], 1)
    assert edge.choices[0] == (exact, 1)


def test_a_frontier_is_found_once_for_each_rank_multiple():
    layer, other = random_layer(0), random_layer(0)
    assert frontier(layer) is frontier(layer) and frontier(layer, 2) is frontier(layer, 2)
    assert frontier(layer, 2).costs != frontier(layer).costs
    assert frontier(layer) is not frontier(other) and frontier(layer).costs == frontier(other).costs
