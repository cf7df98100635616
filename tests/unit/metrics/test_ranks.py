"""Ranks of layers are those of their folded weights, dense or factorized."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.mathematics import ranks
from lr_callback.mathematics.folding import FOLDINGS, fold
from lr_callback.metrics import EffectiveRank, StableRank
from lr_callback.metrics.functional import effective_rank, stable_rank

PAIRS = [(effective_rank, ranks.effective_rank, EffectiveRank), (stable_rank, ranks.stable_rank, StableRank)]


@pytest.mark.parametrize(("rank_of", "exact", "metric"), PAIRS)
@pytest.mark.parametrize("folding", FOLDINGS)
def test_a_layer_a_weight_and_a_metric_say_the_same(rank_of, exact, metric, folding):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, (2, 3), dtype=torch.float64)
    wanted = exact(fold(layer.weight, folding, 1))
    assert rank_of(layer, folding) == rank_of(layer.weight, folding) == wanted
    filled = metric(folding)
    filled.update(layer)
    assert filled.compute().item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(("rank_of", "exact"), [pair[:2] for pair in PAIRS])
def test_groups_are_blocks_on_the_diagonal_and_factors_their_product(rank_of, exact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(9, 7))
    whole = [torch.block_diag(*layer.weight.flatten(1).chunk(2)) for layer in model[:1]]
    whole += [torch.block_diag(*(part.transpose(0, 1).flatten(1) for part in model[1].weight.chunk(2)))]
    whole += [model[2].weight]
    for layer, matrix in zip(model, whole, strict=True):
        assert rank_of(layer).item() == pytest.approx(exact(matrix[None]).item(), rel=1e-6)
    before = [rank_of(layer).item() for layer in model]
    lrc.factorize_(model, lrc.allocate(model, 1.0, method=lrc.UniformRank()))
    assert [rank_of(layer).item() for layer in model] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("rank_of", [effective_rank, stable_rank])
def test_gradients_reach_the_weight_or_the_factors(rank_of):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    rank_of(model[0]).backward()
    assert model[0].weight.grad.any()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    rank_of(model[0]).backward()
    assert all(factor.grad.any() for factor in model[0].factors)


def test_dtypes():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = effective_rank(torch.eye(3, dtype=dtype))
        assert found.item() == pytest.approx(3) and found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(("rank_of", "metric"), [(pair[0], pair[2]) for pair in PAIRS])
def test_what_has_no_rank_is_refused_and_nothing_is_added(rank_of, metric):
    filled, name = metric(), metric.__name__
    for given, kind, text in (
        (torch.ones(3), ValueError, r"a tensor must be a matrix or a weight .*, got \(3,\) in torch.float32"),
        (torch.ones(3, 3).long(), ValueError, r"of a floating dtype, .*got \(3, 3\) in torch.int64"),
        (torch.ones(0, 3), ValueError, r"with an entry at least, got \(0, 3\)"),
        (nn.ReLU(), TypeError, "a layer of a type that can be factorized, got an object of the type ReLU"),
        (nn.Sequential(nn.Linear(2, 2)), TypeError, "type Sequential. Of a model give one layer after the other"),
        (3, TypeError, "must be given a tensor, or a layer .* type int"),
    ):
        for function in (rank_of, filled.update):
            with pytest.raises(kind, match=f"{name}: .*{text}"):
                function(given)
    assert filled.count == 0
    for function in (metric, lambda folding: rank_of(torch.eye(2), folding)):
        with pytest.raises(ValueError, match=r"`folding` must be one of .*, got 'none'"):
            function("none")
