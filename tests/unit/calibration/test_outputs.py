"""Outputs: how far they vary, whatever the batches they come in, and what cannot be compared."""

import pytest
import torch

from lr_callback.calibration.outputs import Sums, add, changes, outputs_of, summed


def test_sums_have_the_variance_of_all_entries_in_whatever_parts_they_came():
    values = torch.randn(7, 5) + 100
    parts = [{}, {}]
    add(parts[0], [values[:2]])
    add(parts[1], [values[2:4]])
    add(parts[1], [values[4:]])
    found = summed(parts)
    assert found[0].variance(35) == pytest.approx(values.double().var(unbiased=False).item(), rel=1e-9)


def test_what_was_not_added_counts_as_zero_and_what_is_alike_as_no_variance():
    one = Sums()
    one.add(torch.tensor([3.0, -3.0]))
    assert one.variance(8) == 18 / 8
    same = Sums()
    same.add(torch.full((1000,), 0.1, dtype=torch.float64))
    assert same.variance(1000) == 0


def test_outputs_are_the_floating_tensors_in_any_nesting():
    scores, boxes = torch.randn(2, 3, requires_grad=True), torch.randn(4, dtype=torch.float16)
    found = outputs_of(
        [{"scores": scores, "labels": torch.tensor([1])}, torch.tensor(0.3), None, (boxes, torch.zeros(0))]
    )
    assert [one.dtype for one in found] == [torch.float32, torch.float16] and not found[0].requires_grad
    with pytest.raises(ValueError, match=r"got 1 tensor\(s\), none of floating numbers with an axis. Give a `forw"):
        outputs_of({"labels": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"got 1 tensor\(s\), none of floating numbers with an axis"):
        outputs_of(torch.tensor(0.3))


def test_what_cannot_be_compared_is_refused():
    wanted, found = [torch.zeros(2, 3)], [torch.ones(2, 3)]
    assert torch.equal(changes("layer", wanted, found)[0], torch.ones(2, 3, dtype=torch.float64))
    for other in ([torch.zeros(2, 2)], [*found, *found], []):
        with pytest.raises(ValueError, match=r"layer: the outputs of the model must be of the same shapes .*scores"):
            changes("layer", wanted, other)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="outputs of the model on the calibration batches with layer cut must be"):
            add({}, [torch.tensor([1.0, value])], " with layer cut")
