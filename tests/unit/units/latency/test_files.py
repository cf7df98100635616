"""Measured times on the disk."""

import json
import os
import re
import subprocess
import sys
from time import time

import pytest
import torch

from lr_callback.units.latency import Timing, device_facts
from lr_callback.units.latency.files import LEFT_BEHIND, Times, folder

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
TIME = Timing(1234, 0.05)


def kept(layer: str = "layer", form: str = "dense", timing: Timing = TIME) -> Times:
    times = Times(CPU)
    times.put(layer, form, timing)
    times.save()
    return times


def test_what_is_kept_is_known_to_the_next_run():
    kept()
    again = Times(CPU)
    assert (again.get("layer", "dense"), again.get("layer", "other"), again.get("other", "dense")) == (TIME, None, None)


def test_two_runs_at_once_keep_what_both_measured():
    first, second = Times(CPU), Times(CPU)
    for times, name in ((first, "one"), (second, "two")):
        times.put(name, "dense", TIME)
        times.save()
    assert [Times(CPU).get(name, "dense") for name in ("one", "two")] == [TIME, TIME]
    assert [file.name for file in folder().iterdir()] == [first.path.name]


WRITER = """
import sys, torch
from lr_callback.units.latency import Timing
from lr_callback.units.latency.files import Times
for count in range(30):
    times = Times(torch.device("cpu"))
    times.put(f"{sys.argv[1]} {count}", "dense", Timing(1 + count, 0.0))
    times.save()
"""


def test_processes_that_write_at_once_lose_nothing():
    names = ["one", "two", "three"]
    running = [subprocess.Popen([sys.executable, "-c", f"{WRITER}", name]) for name in names]
    assert [process.wait() for process in running] == [0, 0, 0]
    (file,) = folder().iterdir()
    written = json.loads(file.read_text("utf-8"))["times"]
    assert sorted(written) == sorted(f"{name} {count}" for name in names for count in range(30))


def test_a_lock_that_a_killed_process_left_is_removed():
    lock = kept("first").path.with_suffix(".lock")
    lock.touch()
    before = time() - 2 * LEFT_BEHIND
    os.utime(lock, (before, before))
    assert kept("second").get("second", "dense") == TIME
    assert not lock.exists()
    assert Times(CPU).get("second", "dense") == TIME


def test_nothing_new_writes_nothing():
    Times(CPU).save()
    assert not folder().exists()


def test_each_number_of_threads_has_a_file_of_its_own():
    before, threads = Times(CPU).path, torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Times(CPU).path != before
    finally:
        torch.set_num_threads(threads)


def test_a_file_of_another_device_is_refused():
    path = kept().path
    written = json.loads(path.read_text("utf-8"))
    written["device"]["name"] = "another processor"
    path.write_text(json.dumps(written), encoding="utf-8")
    own = re.escape(repr(device_facts(CPU)["name"]))
    match = (
        rf"must be of this device, and is of another \(name: 'another processor', here {own}\).* "
        "remove the file, or set LR_CALLBACK_CACHE to another folder"
    )
    with pytest.raises(ValueError, match=match):
        Times(CPU)


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 2, "device": {}, "times": {"layer": {"dense": [5, Infinity]}}}',
        '{"version": 2, "device": {}, "times": {"layer": {"dense": [1' + 400 * "0" + ", 0.1]}}}",
        "[" * 100_000,
        "{",
        "[]",
        '{"version": 99, "device": {}, "times": {}}',
        '{"version": 2, "device": {}, "times": {"layer": {"dense": [0, 0.1]}}}',
        '{"version": 2, "device": {}, "times": {"layer": {"dense": [5]}}}',
        '{"version": 2, "device": {}, "times": {"layer": 3}}',
    ],
)
def test_a_damaged_file_is_told_of_and_written_anew(text):
    path = kept().path
    path.write_text(text, encoding="utf-8")
    with pytest.warns(
        UserWarning, match=r"cannot be read \((.|\n)*The layers are measured again, and it is written anew"
    ):
        times = Times(CPU)
    assert times.get("layer", "dense") is None
    times.put("layer", "dense", TIME)
    times.save()
    assert Times(CPU).get("layer", "dense") == TIME


def test_times_of_a_noisy_moment_are_of_use_now_and_not_later():
    times = kept("noisy", timing=Timing(50, 3.0))
    assert times.get("noisy", "dense") == Timing(50, 3.0)
    assert Times(CPU).get("noisy", "dense") is None


def test_a_time_in_the_file_that_is_not_steady_is_not_known():
    file = kept("right").path
    kept("other")
    written = json.loads(file.read_text("utf-8"))
    written["times"]["other"]["dense"][1] = 5.0
    file.write_text(json.dumps(written), encoding="utf-8")
    again = Times(CPU)
    assert (again.get("right", "dense"), again.get("other", "dense")) == (TIME, None)
    again.put("new", "dense", TIME)
    again.save()
    assert "dense" not in json.loads(file.read_text("utf-8"))["times"]["other"]


def test_what_is_forgotten_is_gone_from_the_file():
    kept("right")
    kept("wrong")
    times = Times(CPU)
    times.forget("wrong")
    assert times.get("wrong", "dense") is None
    times.save()
    again = Times(CPU)
    assert (again.get("wrong", "dense"), again.get("right", "dense")) == (None, TIME)


def test_what_is_forgotten_can_be_measured_again():
    kept("wrong")
    times = Times(CPU)
    times.forget("wrong")
    times.put("wrong", "dense", Timing(1, 0.0))
    times.save()
    assert Times(CPU).get("wrong", "dense") == Timing(1, 0.0)


def test_files_can_be_read_by_all_who_share_the_folder():
    assert kept().path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_read_is_told_of():
    path = kept().path
    path.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match=r"cannot be read \(UnicodeDecodeError"):
        Times(CPU)


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LR_CALLBACK_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="Measured times are not kept for the next run: .* Set LR_CALLBACK_CACHE to"):
        kept()


def test_the_folder_is_where_caches_are(tmp_path, monkeypatch):
    monkeypatch.delenv("LR_CALLBACK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "lr_callback" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "lr_callback" / "latency"
    assert "HOME" in os.environ
