"""Lockstep: runs wait, go on, and end, whatever happens."""

import threading

import pytest
import torch

from lr_callback.lockstep import this_walk, walks


def counting(log, name, stops=3):
    def run():
        for stop in range(stops):
            log.append((name, stop))
            this_walk().wait(str(stop), torch.tensor(float(stop)))
        log.append((name, "end"))

    return run


def test_runs_go_on_when_told_to_and_in_that_order():
    log = []
    with walks([counting(log, "a"), counting(log, "b")], before=False) as (one, other):
        assert log == [] and one.at is None
        one.step()
        other.step()
        assert (one.at, one.tensor.item(), other.at) == ("0", 0.0, "0")
        assert other.step_to("2").item() == 2.0
        one.step_to("end")
        assert one.at is None and one.tensor is None
        one.step()  # over: nothing happens
    assert log == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("a", 1), ("a", 2), ("a", "end")]


def test_runs_are_without_gradients_and_outside_of_them_there_is_none():
    seen = []
    assert this_walk() is None
    with walks([lambda: seen.append((torch.is_grad_enabled(), this_walk()))], before=True) as [walk]:
        walk.step()
        assert seen == [(False, walk)] and walk.before


def test_an_error_of_a_run_comes_out_and_all_runs_end():
    def fail():
        this_walk().wait("first", torch.zeros(1))
        raise KeyError("of the model")

    log, threads = [], threading.active_count()
    with pytest.raises(KeyError, match="of the model"), walks([counting(log, "a"), fail], before=False) as (one, other):
        one.step()
        other.step_to("never")
    assert log == [("a", 0)] and threading.active_count() == threads


def test_a_model_that_catches_exceptions_ends_too():
    ended = []

    def stubborn():
        try:
            this_walk().wait("first", torch.zeros(1))
        except Exception:
            ended.append("went on")
        finally:
            ended.append("left")

    with walks([stubborn, stubborn], before=False) as (one, _):
        one.step()
    assert ended == ["left"]
