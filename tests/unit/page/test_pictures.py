"""The figures of a page: what is known is drawn, under names of its own."""

import re
from dataclasses import replace

import pytest
from torch import nn

import lr_callback as lrc
from lr_callback.page.pictures import beside, pictures_of

pytest.importorskip("matplotlib", reason="needs matplotlib")


def test_a_name_with_hyphens_stays_on_its_line():
    assert beside("backbone.text-encoder.layer-11.mlp-block.dense-out") == "...mlp-block.dense-out"


@pytest.fixture(scope="module")
def analysed():
    analysis = lrc.analyze(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)))
    allocation = analysis.allocate(0.5)
    return allocation, analysis.curves(allocation)


def test_with_curves_there_are_three_and_without_one(analysed):
    allocation, curves = analysed
    assert [one.title for one in pictures_of(allocation, curves)] == [
        "What each layer kept", "Error against size", "Spectra",
    ]  # fmt: skip
    assert [one.title for one in pictures_of(allocation, None)] == ["What each layer kept"]
    bare = pictures_of(allocation, replace(curves, tradeoff=()))
    assert [one.title for one in bare] == ["What each layer kept", "Spectra"]


@pytest.mark.parametrize("error", ["slice", "operator"])
def test_without_singular_values_there_are_no_spectra(error):
    """Of ``operator`` the analysis tells them where a layer has one slice."""
    analysis = lrc.analyze(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), lrc.ALDS(error=error, slices=[2]))
    allocation = analysis.allocate(0.5)
    curves = analysis.curves(allocation)
    told = any(value is not None for layer in curves.layers.values() for value in layer.values)
    assert told == (error == "slice")
    assert ("Spectra" in [one.title for one in pictures_of(allocation, curves)]) == told
    some = replace(curves, layers={**curves.layers, "0": replace(curves.layers["0"], values=curves.layers["0"].errors)})
    assert "Spectra" in [one.title for one in pictures_of(allocation, some)]


def test_their_names_differ_and_each_has_a_label(analysed):
    pictures = pictures_of(*analysed)
    ids = [set(re.findall(r'\bid="([^"]*)"', one.svg)) for one in pictures]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 50
    labels = [re.search(r'aria-label="([^"]+)"', one.svg)[1] for one in pictures]
    assert labels == [one.caption[: len(label)] for one, label in zip(pictures, labels, strict=True)]


def test_they_are_the_same_each_time(analysed):
    assert pictures_of(*analysed) == pictures_of(*analysed)


def test_letters_are_read_on_a_phone_whatever_the_names(analysed):
    """A figure is scaled down to 0.9 pixels for a point, and 292 pixels are what a phone of 360 has for it."""
    model = nn.ModuleDict({f"a_very_long_name_{'of_a_layer' * 9}_{index}": nn.Linear(64, 64) for index in range(3)})
    analysis = lrc.analyze(model)
    allocation = analysis.allocate(0.5)
    for pictures in (pictures_of(*analysed), pictures_of(allocation, analysis.curves(allocation))):
        assert all(int(re.search(r"min-width: (\d+)px", one.svg)[1]) <= 292 for one in pictures[:2])


def test_a_layer_with_a_name_of_markup_is_drawn_as_it_is_and_harms_nothing():
    model = nn.ModuleDict({"<script>&$x_1$": nn.Linear(64, 64)})
    analysis = lrc.analyze(model)
    allocation = analysis.allocate(0.5)
    assert not any("<script" in one.svg for one in pictures_of(allocation, analysis.curves(allocation)))
