"""Allocations: totals, the written form there and back, refusals, the printed table."""

import copy
import io
import json

import pytest
import torch

from lr_callback.decisions.allocation import VERSION, Allocation
from lr_callback.decisions.factorization import Factorization

CONV = Factorization("height_in_decoder", 4, 3, 0.25, 300, 1000)
LINEAR = Factorization("kernel_in_encoder", 1, 7, 0.5, 400, 500)


def example(**changes) -> Allocation:
    fields = {
        "layers": {"conv": CONV, "head.linear": LINEAR, "stem": None},
        "skipped": {"norm": "not a layer", "tiny": "too small", "mini": "too small"},
        "shapes": {"conv": (16, 8, 3, 3), "head.linear": (10, 40), "stem": (8, 3, 1, 1)},
        "cost": 1200,
        "dense_cost": 2000,
        "budget": 1250,
        "keep_ratio": 0.625,
        "unit": "parameters",
        "error": "slice",
        "method": {"name": "ALDS", "foldings": ["kernel_in_encoder"], "max_slices": None},
    }
    return Allocation(**{**fields, **changes})


def damaged(*path: str, value: object = None, drop: bool = False) -> dict:
    """Return a written allocation with one entry set to a value, or dropped."""
    written = copy.deepcopy(example().to_dict())
    inner = written
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return written


def test_totals_are_those_of_the_layers():
    allocation = example()
    assert allocation.worst_error == 0.5
    assert allocation.mean_error == pytest.approx((0.25 + 0.5 + 0.0) / 3)
    assert allocation.factorized == {"conv": CONV, "head.linear": LINEAR}


@pytest.mark.parametrize("layers", [{}, {"stem": None}])
def test_without_a_factorized_layer_there_is_no_error(layers):
    allocation = example(layers=layers, shapes=dict.fromkeys(layers, (2, 2)))
    assert (allocation.worst_error, allocation.mean_error, allocation.factorized) == (0.0, 0.0, {})


def test_an_allocation_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign"):
        example().budget = 1


def test_dict_and_json_there_and_back_give_the_same_value():
    allocation = example()
    assert Allocation.from_dict(allocation.to_dict()) == allocation
    assert Allocation.from_json(allocation.to_json()) == allocation
    assert json.loads(allocation.to_json()) == allocation.to_dict()


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_there_and_back_gives_the_same_value(kind, tmp_path):
    path = tmp_path / "allocation.json"
    text = example().to_json(kind(path))
    assert path.read_text(encoding="utf-8").strip() == text
    assert Allocation.from_json(kind(path)) == example()


def test_a_name_beyond_ascii_survives_the_file(tmp_path):
    allocation = example(layers={"größe": CONV}, shapes={"größe": (16, 8, 3, 3)})
    allocation.to_json(tmp_path / "a.json")
    assert Allocation.from_json(tmp_path / "a.json") == allocation


def test_text_may_begin_with_blanks():
    assert Allocation.from_json("\n  " + example().to_json()) == example()


def test_the_written_form_passes_torch_load_with_weights_only():
    stored = io.BytesIO()
    torch.save(example().to_dict(), stored)
    stored.seek(0)
    assert Allocation.from_dict(torch.load(stored, weights_only=True)) == example()


def test_the_written_form_is_a_copy():
    allocation = example()
    written = allocation.to_dict()
    written["layers"]["conv"]["rank"] = 99
    written["shapes"]["conv"].append(1)
    written["method"]["foldings"].clear()
    assert allocation == example()
    assert written["version"] == VERSION


def test_a_gap_is_written_and_a_file_from_before_there_was_one_has_none():
    allocation = example(gap=0.0125)
    assert Allocation.from_json(allocation.to_json()) == allocation
    assert Allocation.from_dict(damaged("gap", drop=True)) == example(gap=0.0)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_gap_that_none_can_be_is_refused(value):
    with pytest.raises(ValueError, match=r"Allocation: `gap` must be from 0 to 1, got float"):
        Allocation.from_dict(damaged("gap", value=value))


def test_the_summary_tells_a_gap_and_says_nothing_where_there_is_none():
    assert "objective proven within 3.2e-07 of the smallest" in example(gap=3.2e-7).summary()
    assert max(map(len, str(example(gap=3.2e-7)).splitlines())) <= 80
    assert "objective" not in str(example())


def test_weights_are_written_and_a_file_from_before_there_were_any_has_none():
    allocation = example(weights={"conv": 2.5, "stem": 0.5})
    assert Allocation.from_json(allocation.to_json()) == allocation
    assert Allocation.from_dict(damaged("weights", drop=True)) == example(weights={})


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.5", None, True, [1]])
def test_a_shrinkage_that_no_method_has_is_refused(value):
    written = {**example().to_dict(), "method": {"name": "ALDS", "shrinkage": value}}
    with pytest.raises(ValueError, match=r"^Allocation: `shrinkage` of the method must be from 0 to 1, got "):
        Allocation.from_dict(written)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", True])
def test_weights_that_none_can_be_are_refused(value):
    with pytest.raises(ValueError, match=r"Allocation: `weights` must be finite numbers from 0, got dict"):
        Allocation.from_dict(damaged("weights", value={"conv": value}))


def test_entries_that_a_later_version_may_add_are_passed_over():
    assert Allocation.from_dict({**example().to_dict(), "remark": "by hand"}) == example()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], r"Allocation: must be a dict with the keys .* got list '\[\]'"),
        ({}, r"Allocation: must be a dict with the keys .*'version', got dict"),
        (damaged("version", drop=True), "among them 'version', got dict"),
        (damaged("version", value=VERSION + 1), rf"version {VERSION + 1} is newer than {VERSION}.*update lr_callback"),
        (damaged("version", value="next"), "Allocation: `version` must be a whole number from 1, got str 'next'"),
        (damaged("budget", drop=True), r"Allocation: `budget` is missing, found \['cost', .*damaged or foreign"),
        (damaged("budget", value="12"), "Allocation: `budget` must be int, got str '12'"),
        (damaged("budget", value=True), "Allocation: `budget` must be int, got bool 'True'"),
        (damaged("keep_ratio", value=None), "`keep_ratio` must be int or float, got NoneType 'None'"),
        (damaged("layers", value=[]), r"Allocation: `layers` must be dict, got list '\[\]'"),
        (damaged("layers", "conv", value=3), "Allocation, layer 'conv': must be a dict or null, got int '3'"),
        (damaged("layers", "conv", "rank", drop=True), "Allocation, layer 'conv': `rank` is missing"),
        (damaged("layers", "conv", "rank", value=1.5), "Allocation, layer 'conv': `rank` must be int, got float '1.5'"),
        (damaged("layers", "conv", "rank", value=0), "layer 'conv': .* and `rank` must be at least 1, got 4, 0"),
        (damaged("layers", "conv", "num_slices", value=-1), "layer 'conv': `num_slices` and .* got -1, 3"),
        (damaged("layers", "conv", "folding", value="flat"), r"layer 'conv': `folding` must be one .* got 'flat'"),
        (damaged("shapes", "conv", drop=True), r"`shapes` must name the same layers as `layers`, .* in \['conv'\]"),
        (damaged("shapes", "more", value=[1, 2]), r"`shapes` must name the same layers as `layers`, .* in \['more'\]"),
        (damaged("shapes", "conv", value=None), "layer 'conv': its shape must be a list .* got NoneType"),
        (damaged("shapes", "conv", value=16), "layer 'conv': its shape must be a list .* got int '16'"),
        (damaged("shapes", "conv", value=["x", 3]), "layer 'conv': its shape must be a list .* whole numbers"),
    ],
)
def test_a_damaged_allocation_is_refused_with_where_and_what(written, message):
    with pytest.raises(ValueError, match=message):
        Allocation.from_dict(written)


def test_a_text_that_is_cut_off_is_refused_with_the_place():
    text = example().to_json()
    with pytest.raises(ValueError, match=r"Allocation text: must be JSON, broken at line \d+, column \d+ .*cut off"):
        Allocation.from_json(text[: len(text) // 2])


def test_a_file_that_is_no_allocation_is_refused_with_its_name(tmp_path):
    (tmp_path / "cut.json").write_text("")
    with pytest.raises(ValueError, match=r"Allocation file 'cut\.json': must be JSON, broken at line 1"):
        Allocation.from_json(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"Allocation: must be a dict .* got list '\[1, 2\]'"):
        Allocation.from_json(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="absent"):
        Allocation.from_json(str(tmp_path / "absent.json"))


def test_printed_it_is_a_table_of_all_layers_the_reasons_and_the_totals():
    assert str(example()).splitlines() == [
        "layer        shape     folding    slices  rank  error    kept",
        "conv         16x8x3x3  decoder h       4     3  0.250   30.0%",
        "head.linear  10x40     encoder         1     7  0.500   80.0%",
        "stem         8x3x1x1   dense                           100.0%",
        "dense stem: within the budget",
        "skipped norm: not a layer",
        "skipped tiny, mini: too small",
        "2 of 3 layers factorized: 2,000 -> 1,200 parameters (60.0% kept, 62.5% asked),",
        "  worst slice error 0.500",
    ]


def reasons_in(allocation):
    return [line for line in str(allocation).splitlines() if line.startswith(("dense", "overridden", "skipped"))]


def test_a_dense_layer_is_told_with_what_keeps_it_dense():
    others = {"skipped": {}}
    assert reasons_in(example(max_error=0.1, **others)) == ["dense stem: all smaller forms err by more than 0.1"]
    assert reasons_in(example(overridden=("stem", "conv"), **others)) == [
        "overridden stem, conv: they are what `overrides` says, whatever the budget"
    ]
    assert reasons_in(example(skipped={"stem": "frozen"})) == ["skipped stem: frozen"]


def test_overridden_layers_are_written_and_a_file_from_before_there_were_any_has_none():
    allocation = example(overridden=("stem", "conv"))
    assert Allocation.from_json(allocation.to_json()) == allocation
    assert Allocation.from_dict(damaged("overridden", drop=True)) == example()


@pytest.mark.parametrize("value", [["absent"], [1], [["stem"]], [None]])
def test_overridden_layers_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"Allocation: `overridden` must be names of its layers, got list"):
        Allocation.from_dict(damaged("overridden", value=value))


def test_the_summary_comes_last_and_names_unit_and_measure():
    allocation = example(unit="multiply_adds", error="operator")
    assert " ".join(str(allocation).split()).endswith(allocation.summary())
    assert "multiply-adds" in allocation.summary() and "worst operator error" in allocation.summary()
