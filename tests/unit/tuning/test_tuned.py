"""What is chosen by given times, and how it is shown, written and read."""

import json
from dataclasses import replace

import pytest

from lr_callback import Tuning
from lr_callback.common.table import WIDTH
from lr_callback.tuning.tuned import LayerForms, is_faster
from lr_callback.units.latency import Timing


def forms(built, block=None, dense=None, spread=0.0, count=4, rank=3):
    times = {"as built": built, "one block": block, "dense": dense}
    known = {form: Timing(time, spread) for form, time in times.items() if time is not None}
    return LayerForms("kernel_in_encoder", count, rank, known)


def tuning(built=1000, tuned=800, laid_out=None, spread=0.0, pointwise=None, **layers):
    whole = {"as built": built, "tuned": tuned, "channels_last": laid_out, "pointwise": pointwise}
    times = {form: Timing(time * 1000, spread) for form, time in whole.items() if time is not None}
    return Tuning(layers or {"first": forms(100, 50, 80), "second": forms(100, 98, 99)}, times)


@pytest.mark.parametrize(
    ("times", "spread", "chosen"),
    [
        ((100, 90, 80), 0.0, "dense"),
        ((100, 80, 90), 0.0, "one block"),
        ((100, None, 90), 0.0, "dense"),
        ((100, 95, 96), 0.0, "as built"),
        ((100, 94, 96), 0.0, "one block"),
        ((100, 120, 130), 0.0, "as built"),
        ((100, 80, 81), 0.3, "as built"),
        ((100, 60, 81), 0.3, "one block"),
        ((100, 80, 1), 1.5, "as built"),
        ((100,), 0.0, "as built"),
    ],
)
def test_the_fastest_form_is_chosen_unless_it_is_not_clearly_faster(times, spread, chosen):
    assert forms(*times, spread=spread).chosen == chosen


def test_a_time_whose_own_runs_differ_is_not_faster():
    assert is_faster(Timing(80, 0.1), Timing(100, 0.1))
    assert not is_faster(Timing(80, 0.21), Timing(100, 0.0))
    assert not is_faster(Timing(80, 0.0), Timing(100, 0.21))


def test_the_structure_in_each_form():
    layer = forms(1, 1, 1, count=4, rank=3)
    assert [layer.structure(form) for form in layer.times] == [(4, 3), (1, 12), None]


@pytest.mark.parametrize(
    ("built", "tuned", "changed"),
    [(1000, 800, {"first": "one block"}), (1000, 1000, {"first": "one block"}), (1000, 1100, {}), (1000, None, {})],
)
def test_a_model_that_is_slower_as_a_whole_stays_as_built(built, tuned, changed):
    found = tuning(built, tuned)
    assert found.changed == changed
    assert found.time.nanoseconds == (tuned if changed else built) * 1000


def test_channels_last_is_compared_with_what_is_chosen():
    assert tuning(1000, 800, 700).channels_last_is_faster
    assert not tuning(1000, 800, 790).channels_last_is_faster
    assert tuning(1000, 1100, 900).channels_last_is_faster
    assert not tuning(1000, 800).channels_last_is_faster


def test_pointwise_is_compared_with_what_is_chosen():
    assert tuning(1000, 800, pointwise=700).pointwise_is_faster
    assert not tuning(1000, 800, pointwise=790).pointwise_is_faster
    assert not tuning(1000, 800, 700).pointwise_is_faster


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (tuning(pointwise=700), "Linear layers as convolutions of one pixel, `pointwise_(model)`, it is faster."),
        (tuning(pointwise=790), "of one pixel, `pointwise_(model)`, it is not clearly faster."),
        (tuning(), "1 of 2 factorized layers are faster in another form: 0.8 ms in place of 1 ms for the whole model."),
        (tuning(1000, 970), "1 of 2 factorized layers are faster in another form; the whole model is not clearly"),
        (tuning(1000, 1100), "With the forms that are faster alone the model is slower: the layers stay as they were"),
        (tuning(1000, None, first=forms(100, 99)), "No other form of a layer is clearly faster: the layers stay as"),
        (tuning(1000, 800, 700), "In channels_last, weights and inputs, the model is faster."),
        (tuning(1000, 800, 790), "In channels_last, weights and inputs, the model is not clearly faster."),
    ],
)
def test_it_says_plainly_what_is_faster_and_that_nothing_is(found, told):
    assert told in " ".join(str(found).split())


def test_the_table():
    found = Tuning(
        {"_orig_mod.first": forms(1_500_000, None, 1_000_000), "n" * 90: forms(123_456_789, 99, 9, count=128, rank=64)},
        {"as built": Timing(2_000_000, 0.012), "tuned": Timing(1_500_000, 0.02)},
        {"third": "its forward is not called on the example input, and " + "so on " * 12},
    )
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[1].split() == ["first", "4", "3", "1.5000", "1.0000", "dense"]
    assert lines[2].split()[-6:] == ["128", "64", "123.4568", "0.0001", "0.0000", "dense"]
    assert lines[3].startswith("third stays as built: its forward is not called")
    shown = [line.split() for line in lines]
    assert ["as", "built", "2.0000", "100.0%", "1.2%"] in shown
    assert ["tuned", "1.5000", "75.0%", "2.0%"] in shown


def test_json_there_and_back(tmp_path):
    found = replace(
        tuning(1000, 800, 700, 0.01, 690), skipped={"third": "held"}, inputs=("2x3 float32",), device={"a": [1]}
    )
    assert Tuning.from_json(found.to_json(tmp_path / "tuning.json")) == found
    assert Tuning.from_json(tmp_path / "tuning.json") == found
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["changed"] == {"first": "one block"}
    assert written["layers"]["first"]["chosen"] == "one block"
    assert written["layers"]["first"]["times"] == {"as built": [100, 0.0], "one block": [50, 0.0], "dense": [80, 0.0]}


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda one: one.pop("whole"), "Tuning: `whole` is missing"),
        (lambda one: one.update(layers=[]), "Tuning: `layers` must be dict, got list"),
        (lambda one: one["layers"].update(first=3), "Tuning: layer 'first': must be a dict, got int"),
        (lambda one: one["layers"]["first"].pop("rank"), "Tuning: layer 'first': `rank` is missing"),
        (lambda one: one["layers"]["first"]["times"].update(dense=[0, 0.1]), "Tuning: layer 'first': must give nano"),
        (
            lambda one: one["layers"]["first"]["times"].update(other=[1, 0.1]),
            "for 'as built' and any of .'one block', ",
        ),
        (lambda one: one["whole"].pop("as built"), "Tuning: `whole`: must give nanoseconds, from 1, and their spread"),
        (lambda one: one["whole"].update(tuned=7), "found .*; measure again with `tune`"),
    ],
)
def test_damaged_json_is_refused(damage, text):
    written = tuning().to_dict()
    damage(written)
    with pytest.raises(ValueError, match=text):
        Tuning.from_json(json.dumps(written))


def test_what_is_no_object_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must be what `Tuning.to_json.*` writes, found a list"):
        Tuning.from_json(tmp_path / "list.json")
