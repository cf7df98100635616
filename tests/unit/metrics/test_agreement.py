"""Agreement: samples counted one by one, in any shape; what is no pair of scores is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lr_callback.metrics import PredictionAgreement
from lr_callback.metrics.functional import prediction_agreement


def slow(preds, target, top_k):
    """Return the fraction, sample by sample, the first of equal scores being the higher."""
    agreed, samples = 0, 0
    for own, other in zip(preds.movedim(1, -1).flatten(0, -2), target.movedim(1, -1).flatten(0, -2), strict=True):
        wanted = max(range(len(other)), key=lambda one: (float(other[one]), -one))
        best = sorted(range(len(own)), key=lambda one: (-float(own[one]), one))[:top_k]
        agreed, samples = agreed + (wanted in best), samples + 1
    return agreed / samples


@given(
    st.tuples(st.integers(1, 5), st.integers(2, 5)),
    st.lists(st.integers(1, 3), max_size=2),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_it_is_the_fraction_counted_one_by_one(sizes, further, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    shape = (*sizes, *further)  # whole numbers of a small range: many scores are equal
    preds, target = (torch.randint(4, shape, generator=random).to(dtype) for _ in range(2))
    for top_k in range(1, shape[1] + 1):
        found = prediction_agreement(preds, target, top_k)
        assert float(found) == pytest.approx(slow(preds, target, top_k))
    assert found == 1, "every class is among all of them"
    assert prediction_agreement(target, target) == 1


def test_samples_count_the_same_whatever_the_size_of_their_batch():
    random = torch.Generator().manual_seed(0)
    preds, target = (torch.randn(100, 3, generator=random) for _ in range(2))
    metric = PredictionAgreement()
    for rows in (slice(0, 1), slice(1, 8), slice(8, 100), slice(100, 100)):
        metric.update(preds[rows], target[rows])
    assert metric.compute() == prediction_agreement(preds, target)
    assert int(metric.samples) == 100


def test_no_number_agrees_with_none_and_masked_classes_do():
    nan, inf = torch.nan, torch.inf
    preds = torch.tensor([[nan, 1.0], [0.0, 1.0], [0.0, -inf], [2.0, 1.0]])
    target = torch.tensor([[nan, 1.0], [nan, 1.0], [3.0, -inf], [2.0, 1.0]])
    assert prediction_agreement(preds, target) == prediction_agreement(preds, target, top_k=2) == 0.5
    assert prediction_agreement(preds[:0], target[:0]).isnan()


@pytest.mark.parametrize(
    ("preds", "target", "top_k", "text"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), 1, r"must have the same shape, got \(4, 3\) and \(5, 3\)"),
        (torch.zeros(4, 3), torch.zeros(4), 1, r"must have the same shape, got \(4, 3\) and \(4,\)"),
        (torch.zeros(4), torch.zeros(4), 1, r"shape \(N, C\) or \(N, C, ...\) with at least 2 classes .*got \(4,\)"),
        (torch.zeros(4, 1), torch.zeros(4, 1), 1, r"with at least 2 classes on axis 1, got \(4, 1\)"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 3), 1, "of a floating dtype, got torch.int64 and torch.float32"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 4, "`top_k` must be at most the 3 classes, got 4"),
    ],
)
def test_what_is_no_pair_of_scores_is_refused(preds, target, top_k, text):
    metric = PredictionAgreement(top_k)
    for function in (metric.update, lambda preds, target: prediction_agreement(preds, target, top_k)):
        with pytest.raises(ValueError, match=f"PredictionAgreement: .*{text}"):
            function(preds, target)
    assert metric.samples == 0


@pytest.mark.parametrize("scores", [[[1.0, 2.0]], None, "scores"], ids=str)
def test_what_is_no_tensor_is_refused(scores):
    metric, found = PredictionAgreement(), type(scores).__name__
    for pair, told in (((scores, torch.zeros(1, 2)), f"{found} and Tensor"), ((torch.zeros(1, 2), scores), found)):
        for function in (metric.update, prediction_agreement):
            with pytest.raises(TypeError, match=f"`preds` and `target` must be tensors, got .*{told}.* Give what"):
                function(*pair)
    assert metric.samples == 0


def test_what_is_no_number_of_classes_is_refused():
    for bad, kind, text in ((0, ValueError, "at least 1, got 0"), (1.5, TypeError, "a whole number, got 1.5")):
        with pytest.raises(kind, match=f"PredictionAgreement: `top_k` must be {text}"):
            PredictionAgreement(bad)
        with pytest.raises(kind, match=f"PredictionAgreement: `top_k` must be {text}"):
            prediction_agreement(torch.zeros(1, 2), torch.zeros(1, 2), bad)
