"""The arguments of a call, with other numbers of rows; the difference of two outputs."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from lr_callback.common.example import Example, classes_around, largest_difference


class Two(nn.Module):
    def forward(self, left, right, *, scale=1.0):
        return left + right * scale


def test_forms_of_an_example():
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    for given in ((one, other), [one, other], {"left": one, "right": other}, {"right": other, "left": one}):
        assert torch.equal(Example.of(given).call(Two()), one)
    assert Example.of(one).tensors == [one]


@pytest.mark.parametrize("given", [None, "text", (), {"scale": 2.0}, 3])
def test_an_example_without_a_tensor_is_refused(given):
    with pytest.raises(ValueError, match=r"with a tensor among them, got \w+"):
        Example.of(given)


def test_rows_are_the_first_ones_or_all_again():
    example = Example.of({"left": torch.arange(3), "right": torch.arange(6).reshape(3, 2), "scale": 0.5})
    assert example.rows == 3
    assert example.with_rows(1).named["left"].tolist() == [0]
    assert example.with_rows(5).named["left"].tolist() == [0, 1, 2, 0, 1]
    assert example.with_rows(5).named["right"][4].tolist() == [2, 3]
    assert example.with_rows(5).named["scale"] == 0.5


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 3)], [(2,), ()]])
def test_no_number_of_rows(shapes):
    assert Example.of([torch.zeros(shape) for shape in shapes]).rows is None


def test_axes_have_the_names_of_forward():
    example = Example((torch.zeros(2, 3),), {"right": [torch.zeros(2), None], "scale": 2.0})
    assert example.axes(Two(), "batch") == {"left": {0: "batch"}, "right": [{0: "batch"}, None], "scale": None}


def test_difference_is_relative_to_the_largest_value_of_its_tensor():
    expected = {"small": torch.tensor([1e-3, 0.0]), "large": torch.tensor([100.0])}
    found = [expected["large"] + 1, expected["small"]]
    assert largest_difference([expected["large"], expected["small"]], found) == pytest.approx(0.01)
    assert largest_difference(torch.tensor([1e-3]), torch.tensor([2e-3])) == pytest.approx(1.0)
    assert largest_difference(torch.zeros(2), torch.tensor([0.0, 0.5])) == 0.5


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([1.0, torch.nan]), torch.ones(2)),
        ([torch.zeros(2)], []),
        (None, None),
    ],
)
def test_what_cannot_be_compared(expected, found):
    assert largest_difference(expected, found) is None


def test_equal_outputs():
    assert largest_difference((torch.tensor([1, 2]), torch.tensor([torch.inf, 1.0])), [
        torch.tensor([1, 2]), torch.tensor([torch.inf, 1.0])]) == 0.0  # fmt: skip
    assert largest_difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_classes_around_tensors_are_found_in_any_nesting():
    pair = namedtuple("pair", "one two")
    assert classes_around({"outputs": [pair(torch.zeros(1), None)]}) == {pair}
    assert classes_around(OrderedDict(one=(torch.zeros(1), torch.Size([1])))) == set()
