"""Rewind: what was noted of optimizers and schedulers is put back in place, undone, and plain data."""

import io
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler

from lr_callback.edits.rewind import check_schedules, rewind, schedules_of


def parameter():
    return nn.Parameter(torch.ones(2))


def stepped(optimizer, schedulers, steps):
    for _ in range(steps):
        optimizer.step()
        for one in schedulers:
            one.step()


@pytest.fixture
def cycle():
    """Return an optimizer, and a scheduler that turns rate and momentum."""
    optimizer = SGD([{"params": [parameter()]}, {"params": [parameter()], "lr": 0.5}], lr=0.1, momentum=0.9)
    return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20)


def options(optimizer):
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def test_what_was_noted_is_put_back_and_the_same_steps_follow(cycle):
    optimizer, scheduler = cycle
    noted, start = schedules_of([optimizer], [scheduler]), options(optimizer)
    groups = list(map(id, optimizer.param_groups))
    stepped(optimizer, [scheduler], 4)
    later = options(optimizer)
    for _ in range(2):
        rewind([optimizer], [scheduler], noted, ExitStack())
        assert options(optimizer) == start
        stepped(optimizer, [scheduler], 4)
        assert options(optimizer) == later != start
    assert list(map(id, optimizer.param_groups)) == groups
    assert scheduler.optimizer is optimizer


def test_it_can_be_undone(cycle):
    optimizer, scheduler = cycle
    noted = schedules_of([optimizer], [scheduler])
    stepped(optimizer, [scheduler], 4)
    before, state = options(optimizer), str(scheduler.state_dict())
    with ExitStack() as undo:
        rewind([optimizer], [scheduler], noted, undo)
        assert options(optimizer) != before
    assert options(optimizer) == before
    assert str(scheduler.state_dict()) == state


def test_a_scheduler_that_fails_leaves_all_as_it_was(cycle):
    failures = [MemoryError("no more")]

    class Broken(lr_scheduler.StepLR):
        def load_state_dict(self, state_dict):
            if failures:
                raise failures.pop()
            super().load_state_dict(state_dict)

    optimizer, scheduler = cycle
    schedulers = [scheduler, Broken(optimizer, 1)]
    noted = schedules_of([optimizer], schedulers)
    stepped(optimizer, schedulers, 4)
    before, states = options(optimizer), [str(one.state_dict()) for one in schedulers]
    with pytest.raises(MemoryError), ExitStack() as undo:
        rewind([optimizer], schedulers, noted, undo)
    assert options(optimizer) == before
    assert [str(one.state_dict()) for one in schedulers] == states


def test_what_was_noted_does_not_change_and_is_read_without_unpickling(cycle):
    optimizer, scheduler = cycle
    noted = schedules_of([optimizer], [scheduler])
    text = str(noted)
    rewind([optimizer], [scheduler], noted, ExitStack())
    stepped(optimizer, [scheduler], 4)
    assert str(noted) == text
    file = io.BytesIO()
    torch.save(noted, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == noted


def test_a_scheduler_may_change_its_state_in_place():
    class Noting(lr_scheduler.StepLR):
        def __init__(self, optimizer):
            self.seen = []
            super().__init__(optimizer, 1)

        def step(self, *args):
            super().step(*args)
            self.seen.append(self.get_last_lr()[0])

    optimizer = SGD([parameter()], lr=0.1)
    scheduler = Noting(optimizer)
    noted, start = schedules_of([optimizer], [scheduler]), list(scheduler.seen)
    for _ in range(2):
        stepped(optimizer, [scheduler], 2)
        assert len(scheduler.seen) == len(start) + 2
        rewind([optimizer], [scheduler], noted, ExitStack())
        assert scheduler.seen == start


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    rate = torch.tensor(0.25)
    optimizer = Adam([parameter()], lr=rate, foreach=False)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    noted = schedules_of([optimizer], [scheduler])
    stepped(optimizer, [scheduler], 3)
    held = optimizer.param_groups[0]["lr"]
    assert float(held) == 0.25 / 8
    rewind([optimizer], [scheduler], noted, ExitStack())
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.25


def test_a_group_that_was_added_since_keeps_its_rate():
    optimizer = SGD([parameter()], lr=0.1)
    noted = schedules_of([optimizer], [])
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.add_param_group({"params": [parameter()], "lr": 0.3})
    rewind([optimizer], [], noted, ExitStack())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


class Around(torch.optim.Optimizer):
    """A wrapper with groups of its own, which a scheduler changes."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([dict(group) for group in inner.param_groups], {})


def test_the_optimizer_inside_a_wrapper_is_rewound_too():
    inner = SGD([parameter()], lr=0.1)
    outer = Around(inner)
    noted = schedules_of([outer], [])
    for each in (inner, outer):
        each.param_groups[0]["lr"] = 0.9
    rewind([outer], [], noted, ExitStack())
    assert [each.param_groups[0]["lr"] for each in (inner, outer)] == [0.1, 0.1]


@pytest.mark.parametrize("what", ["a scheduler more", "an optimizer less", "a group less"])
def test_what_was_noted_of_others_is_refused_and_nothing_is_changed(what):
    optimizer, other = SGD([{"params": [parameter()]}, {"params": [parameter()]}], lr=0.1), SGD([parameter()], lr=0.2)
    schedulers = [lr_scheduler.StepLR(optimizer, 1)]
    noted = schedules_of([optimizer, other], schedulers)
    optimizer.param_groups[0]["lr"] = 0.9
    if what == "a scheduler more":
        schedulers.append(lr_scheduler.StepLR(other, 1))
    elif what == "a group less":
        optimizer.param_groups.pop()
    optimizers = [optimizer] if what == "an optimizer less" else [optimizer, other]
    message = r"it began with groups \[2, 1\] and 1 schedulers and has groups .* Resume with the optimizers"
    with pytest.raises(ValueError, match=message):
        rewind(optimizers, schedulers, noted, ExitStack())
    assert optimizer.param_groups[0]["lr"] == 0.9
    with pytest.raises(ValueError, match=message):
        check_schedules(optimizers, schedulers, noted)
