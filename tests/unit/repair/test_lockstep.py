"""Lockstep: runs wait, go on, and end, whatever happens."""

import threading

import pytest
import torch

from lr_callback.repair.lockstep import mixed, this_walk, walks


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


def stopping(value, holder=None):
    """Return a run that gives a value, which it has left with a holder meanwhile."""

    def run():
        if holder is not None:
            holder.append(value)
        if this_walk() is not None:
            this_walk().wait("layer", value)
        return {"outputs": holder.pop(0) if holder else value, "words": "these"}

    return run


def test_runs_that_take_what_another_has_left_are_mixed():
    values = torch.ones(3), torch.zeros(3)
    for holder, is_mixed in ((None, False), ([], False)):
        runs = [stopping(value, holder) for value in values]
        assert mixed(runs, [run() for run in runs]) == is_mixed
    shared = {}

    def overwriting(value):
        def run():
            shared["value"] = value
            if this_walk() is not None:
                this_walk().wait("layer", value)
            return shared["value"]

        return run

    runs = [overwriting(value) for value in values]
    assert mixed(runs, values)
    runs = [overwriting(torch.ones(3)), overwriting(torch.full((3,), 1.0 + 1e-4))]
    assert not mixed(runs, [run() for run in runs])


def test_runs_that_fail_together_are_mixed():
    left = []

    def run():
        left.append(1)
        if this_walk() is not None:
            this_walk().wait("layer", torch.ones(1))
        assert len(left) == 1
        left.clear()

    assert mixed([run, run], [run(), run()])


def test_each_run_has_its_own_dtype_of_new_tensors():
    seen = []

    def run():
        torch.set_default_dtype(torch.float64)
        this_walk().wait("layer", torch.ones(1))
        seen.append(torch.zeros(1).dtype)

    with walks([run], before=True) as [walk]:
        walk.step()
        assert torch.get_default_dtype() == torch.float32
        walk.step()
    assert seen == [torch.float64] and torch.get_default_dtype() == torch.float32
