"""The record of a run comes back from plain data as it was, and what is not one is refused with the reason."""

import io
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.host.record import VERSION, Record
from lr_callback.model.observe import observe

WAY_OUT = r"lr_callback\.load_from_checkpoint\(cls, path\)` or `lr_callback\.restore_\(model, path\)`"


@pytest.fixture
def record(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    analysis = lrc.analyze(model)
    written = tmp_path / "cut.ckpt"
    written.touch()
    return Record(
        applied=(1, 4),
        allocation=replace(made := analysis.allocate(0.5), sampled=analysis.curves(made)),
        observation=observe(model, torch.zeros(2, 32)),
        start={"groups": [[{"lr": 0.5}]], "schedulers": [{"last_epoch": 0}]},
        stable_ranks={4: {"0": 3.5}, 5: {"0": 3.0}},
        snapshot_files={"cut": str(written), "dense": str(tmp_path / "gone.ckpt")},
    )


def test_record_comes_back_from_a_file_as_it_was(record):
    buffer = io.BytesIO()
    torch.save(record.to_dict(), buffer)
    buffer.seek(0)
    back = Record.from_dict(torch.load(buffer, weights_only=True))
    assert back == record and back.curves == record.curves is not None
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert Record.from_dict(Record().to_dict()) == Record()


def test_what_was_written_is_a_copy(record):
    record.to_dict()["start"]["groups"].clear()
    record.to_dict()["snapshot_files"].clear()
    assert record.start["groups"] and record.snapshot_files


def test_run_that_goes_on_keeps_what_still_holds(record):
    assert list(record.resumed(keeps_start=True).snapshot_files) == ["cut"]
    assert record.resumed(keeps_start=True).start == record.start
    assert record.resumed(keeps_start=False).start is None


def test_compression_passes_all_events_until_its_epoch(record):
    assert Record(applied=(3,)).after(record.allocation, [0, 5, 3]).applied == (0, 3, 5)
    assert Record().last == -1


def test_newer_version_is_refused_with_the_way_out(record):
    written = {**record.to_dict(), "version": VERSION + 1, "new": 1}
    with pytest.raises(ValueError, match=rf"written by a newer lr_callback.* of version 4, .*up to 3\..*{WAY_OUT}"):
        Record.from_dict(written)


def test_records_of_versions_before_are_read(record):
    written = {**record.to_dict(), "version": 2}
    del written["curves"]
    assert Record.from_dict(written) == record and Record.from_dict(written).curves is None
    del written["teacher"], written["stable_ranks"]
    assert Record.from_dict({**written, "version": 1}) == replace(record, stable_ranks={})


def test_teacher_comes_back_bit_for_bit():
    weights = {"weight": torch.randn(3, 2), "running": torch.tensor(3)}
    buffer = io.BytesIO()
    torch.save(Record(teacher=weights).to_dict(), buffer)
    buffer.seek(0)
    found = Record.from_dict(torch.load(buffer, weights_only=True)).teacher
    assert found.keys() == weights.keys() and all(torch.equal(found[name], one) for name, one in weights.items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": None}, r"it must be a dict with a whole number as `version`, got \{"),
        ({"version": True}, r"a whole number as `version`"),
        ({"step": 3}, r"must have the keys \['allocation', .*\], missing or unknown are \['step'\], got \["),
        ({"applied": 3}, r"`applied` must be a list of epochs, whole numbers from 0, got 3\."),
        ({"applied": [1, -1]}, r"`applied` must be a list of epochs"),
        ({"applied": ["1"]}, r"`applied` must be a list of epochs"),
        ({"allocation": "half"}, r"`allocation` must be a dict or None, got 'half'"),
        ({"allocation": {"version": 1}}, r"`allocation` cannot be read \(ValueError: Allocation: `layers` is missing"),
        ({"observation": {"calls": {}}}, r"`observation` cannot be read \(KeyError: 'dense_multiply_adds'\)"),
        ({"observation": {"calls": {"0": [1]}}}, r"`observation` cannot be read \(TypeError"),
        ({"start": {"groups": []}}, r"`start` must be None or a dict with the lists `groups` and `schedulers`"),
        (
            {"stable_ranks": [[1, {"0": "3"}]]},
            r"`stable_ranks` must be a list of epochs, each with a dict",
        ),
        ({"teacher": {"weight": 3}}, r"`teacher` must be None or a dict of names and tensors, got \{'weight': 3\}"),
        ({"snapshot_files": {"cut": None}}, r"`snapshot_files` must be a dict of names and paths, got \{'cut': None\}"),
    ],
)
def test_foreign_or_damaged_state_is_refused_and_changes_nothing(record, change, text):
    callback = LowRankCompression(0.5, 1, learning_rate_rewind=True)
    callback.load_state_dict(record.to_dict())
    before = callback.state_dict()
    with pytest.raises(ValueError, match=rf"(?s){text}.*The file is damaged, or another program.*{WAY_OUT}"):
        callback.load_state_dict({**record.to_dict(), "applied": [], **change})
    assert callback.state_dict() == before


@pytest.mark.parametrize("key", sorted(Record().to_dict().keys() - {"version"}))
def test_missing_key_is_named(key):
    written = Record().to_dict()
    del written[key]
    with pytest.raises(ValueError, match=rf"missing or unknown are \['{key}'\]"):
        Record.from_dict(written)


@pytest.mark.parametrize("written", [None, 3, [], "state"], ids=str)
def test_what_is_no_dict_is_refused(written):
    with pytest.raises(ValueError, match="it must be a dict with a whole number as `version`, got"):
        Record.from_dict(written)
