"""A compression that fails or is interrupted anywhere leaves everything as it was, and can be resumed."""

import copy
import pkgutil
import resource
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import Adam

import lr_callback
from lr_callback import ALDS, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The calibration batches are few"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # With OnExceptionCheckpoint among the callbacks Lightning looks for its file by itself.
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
PACKAGE = Path(lr_callback.__file__).parent
EDITS = ("build", "optimizers", "rewind", "surgery", "unmoved")
OF_THE_HOST = ("averaging", "cut", "ddp", "journal", "monitors", "neighbours", "snapshots")
NAMES = ("callback", *(f"edits/{name}" for name in EDITS), *(f"host/{name}" for name in OF_THE_HOST))
EDITING = {str(PACKAGE / f"{name}.py") for name in NAMES}
"""The files whose lines change something, or stand around those that do."""
assert all(Path(file).is_file() for file in EDITING)
SEARCHING = {str(PACKAGE / "host" / f"{name}.py") for name in ("accuracy", "copies", "validating")}
"""Those that try networks, which is to change nothing."""
EVENTS, EPOCHS = [1, 2], 4
LAST = "epoch=1-step=8.ckpt"
"""The file from just before the second event."""


def adam(module):
    return Adam(module.parameters(), lr=0.005)


def compression():
    return LowRankCompression(
        [0.6, 0.4], EVENTS, method=ALDS(), refit="cut", include=["network.8", "network.10"], snapshots=True
    )


def finished(trainer):
    module, [optimizer] = trainer.lightning_module, trainer.optimizers
    return copy.deepcopy((dict(module.state_dict()), optimizer.state_dict(), torch.get_rng_state()))


def state_of(trainer, callback):
    """Return all that a compression may change: the very objects, and a copy of every value."""
    module, [optimizer] = trainer.lightning_module, trainer.optimizers
    objects = [id(one) for one in (*module.modules(), *module.parameters(), *module.buffers())]
    groups = [
        (id(group), id(group["params"]), [id(one) for one in group["params"]]) for group in optimizer.param_groups
    ]
    state = [(id(one), id(held), list(held)) for one, held in optimizer.state.items()]
    modes = [(one.training, len(one._forward_hooks), len(one._forward_pre_hooks)) for one in module.modules()]
    return objects, groups, state, modes, finished(trainer), callback.state_dict()


def files_in(root):
    return {path: path.read_bytes() for path in root.rglob("*.ckpt*")}


def at_the_event(act):
    """Return a callback that calls a function just before the second compression."""
    callback = Callback()
    callback.on_train_epoch_start = lambda *given: act(*given) if given[0].current_epoch == EVENTS[1] else None
    return callback


class Lines:
    """Trace the lines of some files of the package that a call executes; raise at one of them, if told to."""

    def __init__(self, stop=None, files=EDITING):
        self.stop, self.files, self.hits, self.order = stop, files, Counter(), []

    def _frame(self, frame, event, argument):
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame, event, argument):
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.hits[place] += 1
            self.order.append((place, self.hits[place]))
            if self.order[-1] == self.stop:
                raise KeyboardInterrupt
        return self._line

    def run(self, function, *arguments):
        sys.settrace(self._frame)
        try:
            return function(*arguments)
        finally:
            sys.settrace(None)


def traced(lines):
    """Return the callback, with the lines of its second compression traced."""
    callback = compression()
    begin = callback.on_train_epoch_start

    callback.on_train_epoch_start = lambda trainer, pl_module: (
        lines.run(begin, trainer, pl_module) if trainer.current_epoch == EVENTS[1] else begin(trainer, pl_module)
    )
    return callback


@pytest.fixture(scope="module")
def whole(tmp_path_factory, loader, new_module, new_trainer):
    """Return an uninterrupted run: its root, its end, and the lines that its second compression executed."""
    root, lines = tmp_path_factory.mktemp("whole"), Lines()
    files = ModelCheckpoint(root, "{epoch}-{step}", save_top_k=-1)
    trainer = new_trainer(root, traced(lines), files, max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(0)
    trainer.fit(new_module(adam), loader(), loader())
    return SimpleNamespace(root=root, end=finished(trainer), lines=lines)


def moments(lines):
    """Choose where to interrupt: each line when it is first, second and last executed."""
    return [(place, hit) for place, hit in lines.order if hit in (1, 2, lines.hits[place])]


@pytest.mark.situation("All or nothing", "interrupt at any line of a compression", "works")
def test_interrupt_at_any_line_leaves_everything_as_it_was_or_done_and_the_run_goes_on_bit_for_bit(
    whole, tmp_path, loader, new_module, new_trainer, same
):
    callback, left = compression(), moments(whole.lines)

    def interrupt_everywhere(trainer, pl_module):
        before, files = state_of(trainer, callback), files_in(tmp_path)
        while left:
            with pytest.raises(KeyboardInterrupt):
                Lines(left[0]).run(callback.on_train_epoch_start, trainer, pl_module)
            if callback.state_dict()["applied"] == EVENTS:
                return  # all lines after the one at which the compression is done
            assert same(state_of(trainer, callback), before), left[0]
            assert files_in(tmp_path) == files
            del left[0]

    callbacks = [
        at_the_event(interrupt_everywhere),
        callback,
        ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1),
    ]
    trainer = new_trainer(tmp_path, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(0)
    trainer.fit(new_module(adam), loader(), loader())
    assert same(finished(trainer), whole.end)
    assert {Path(file).stem for (file, _), _ in left} == {"callback", "snapshots"}
    assert len(left) < 16
    assert len(moments(whole.lines)) > 200


@pytest.mark.situation("All or nothing", "interrupt at any line of a search for the smallest network", "works")
def test_interrupt_at_any_line_of_a_search_leaves_everything_as_it_was(tmp_path, loader, new_module, new_trainer, same):
    options = {
        "method": ALDS(),
        "refit": "cut",
        "include": ["network.10"],
        "calibration_batches": 1,
        "epochs": EVENTS[1],
    }
    ends, lines = [], Lines(files=SEARCHING)

    def run(act):
        callback = LowRankCompression(max_accuracy_drop=2, **options)  # the smallest has at most that much less
        trainer = new_trainer(tmp_path, at_the_event(act(callback)), callback, limit_val_batches=1)
        torch.manual_seed(0)
        trainer.fit(new_module(adam), loader(), loader())
        ends.append(finished(trainer))

    def interrupt_everywhere(callback):
        def act(trainer, pl_module):
            before = state_of(trainer, callback)
            for moment in moments(lines):
                with pytest.raises(KeyboardInterrupt):
                    Lines(moment, SEARCHING).run(callback.on_train_epoch_start, trainer, pl_module)
                assert same(state_of(trainer, callback), before), moment

        return act

    def watch(callback):
        begin = callback.on_train_epoch_start
        callback.on_train_epoch_start = lambda *given: lines.run(begin, *given)
        return lambda *_: None

    run(watch)
    run(interrupt_everywhere)
    assert same(*ends) and len(moments(lines)) > 100


@pytest.fixture
def crash(tmp_path, loader, new_module, new_trainer):
    """Return a function that trains until something is raised, and returns that and the Trainer."""
    handler = signal.getsignal(signal.SIGINT)

    def run(callback, *others, **settings):
        savers = [ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1), OnExceptionCheckpoint(tmp_path, "raised")]
        callbacks = [*others, callback, *savers]
        trainer = new_trainer(tmp_path, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True, **settings)
        torch.manual_seed(0)
        with pytest.raises(BaseException) as raised:
            trainer.fit(new_module(adam), loader(), loader())
        return raised.value, trainer

    yield run
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it once there was an interrupt


@pytest.fixture
def resume(tmp_path, loader, new_module, new_trainer):
    """Return a function that goes on from a file, with everything made anew, and returns what is there at the end."""

    def run(name):
        trainer = new_trainer(tmp_path, compression(), max_epochs=EPOCHS)
        torch.manual_seed(0)
        trainer.fit(new_module(adam), loader(), loader(), ckpt_path=tmp_path / name)
        return finished(trainer)[:2]

    return run


PARTS = {"in the analysis": 0.02, "in the middle": 0.3, "while layers are swapped": 0.6, "done": 0.99, "over": 1.0}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", [LAST, "raised.ckpt"])
@pytest.mark.situation("Checkpoints", "file that OnExceptionCheckpoint writes in the middle of a compression", "works")
def test_run_that_was_interrupted_is_resumed_bit_for_bit(whole, crash, resume, part, name, same):
    chosen = moments(whole.lines)
    callback = traced(Lines(chosen[round(part * (len(chosen) - 1))]))
    error, _ = crash(callback)
    assert type(error) is SystemExit  # as Lightning ends an interrupted run
    assert (callback.state_dict()["applied"] == EVENTS) is (part > 0.9)
    assert same(resume(name), whole.end[:2])


def failing(function, error, at):
    """Return a function that is another one, but raises when it is called for the ``at``-th time."""
    calls = iter(range(1, 1000))

    def called(*arguments, **named):
        if next(calls) == at:
            raise error
        return function(*arguments, **named)

    return called


FAILURES = {
    "decomposition in the analysis": ("torch.linalg.eigvalsh", torch.linalg.LinAlgError("no"), 3),
    "decomposition of a layer": ("lr_callback.edits.build.truncate", torch.linalg.LinAlgError("no"), 1),
    "memory for a layer": ("lr_callback.edits.build.skeleton", torch.OutOfMemoryError("no"), 1),
    "memory for its refit": ("lr_callback.repair.refit.walks", MemoryError("no"), 1),
    "edit of the optimizer": ("lr_callback.edits.optimizers._replace", RuntimeError("no"), 1),
    "report": ("lr_callback.edits.surgery._report", RuntimeError("no"), 1),
    "metrics": ("lr_callback.host.journal.compression_metrics", RuntimeError("no"), 1),
    "memory for a snapshot": ("lightning.pytorch.strategies.Strategy.save_checkpoint", MemoryError("no"), 1),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.situation("All or nothing", "a compression that fails", "works")
def test_failure_changes_nothing_ends_the_run_with_its_cause_and_can_be_resumed(
    whole, tmp_path, crash, resume, monkeypatch, failure, same
):
    place, error, at = failure
    callback, before = compression(), []

    def break_it(trainer, pl_module):
        before.append((state_of(trainer, callback), files_in(tmp_path)))
        owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), error, at))

    found, trainer = crash(callback, at_the_event(break_it))
    monkeypatch.undo()
    assert found is error
    [(state, files)] = before
    assert same(state_of(trainer, callback), state)
    assert {path: content for path, content in files_in(tmp_path).items() if path.name != "raised.ckpt"} == files
    assert same(resume("raised.ckpt"), whole.end[:2])


class Unplugged(ProgressBar):
    """A bar whose output nobody reads any more."""

    def disable(self):
        """Stay as it is."""

    def print(self, *_, **__):
        raise BrokenPipeError("gone")


def test_table_that_cannot_be_printed_undoes_nothing_and_is_warned_of(
    whole, tmp_path, loader, new_module, new_trainer, same
):
    callback = compression()
    trainer = new_trainer(tmp_path, callback, Unplugged(), max_epochs=EPOCHS, enable_progress_bar=True)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"could not be shown \(BrokenPipeError: gone\). Compression and training go"):
        trainer.fit(new_module(adam), loader(), loader())
    assert callback.state_dict()["applied"] == EVENTS
    assert same(finished(trainer), whole.end)


class Broken(CSVLogger):
    """A logger that loses its connection."""

    def log_metrics(self, metrics, step=None):
        if "compression/worst_error" in metrics and step == 8:
            raise ConnectionError("gone")
        super().log_metrics(metrics, step)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.situation("All or nothing", "a logger that fails at a compression", "works")
def test_logger_that_fails_undoes_the_compression_that_it_was_told_of(whole, tmp_path, crash, resume, same):
    callback = compression()
    found, trainer = crash(callback, logger=Broken(tmp_path / "logs"))
    assert type(found) is ConnectionError
    assert callback.state_dict()["applied"] == [1]
    assert callback.allocation.keep_ratio == 0.6
    assert type(trainer.lightning_module.network[10]) is nn.Linear
    assert same(resume("raised.ckpt"), whole.end[:2])


@pytest.mark.situation("All or nothing", "a snapshot that the disk has no room for", "works")
def test_snapshot_that_does_not_fit_on_the_disk_is_left_out_and_the_former_file_stays(
    whole, tmp_path, loader, new_module, new_trainer, same
):
    limits, callback, kept = resource.getrlimit(resource.RLIMIT_FSIZE), compression(), []

    def fill_the_disk(trainer, pl_module):
        kept.append(files_in(tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    class Room(Callback):
        def on_train_batch_start(self, trainer, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if trainer.current_epoch == EVENTS[1]:
                kept.append((files_in(tmp_path), list(callback.snapshot_files)))

    trainer = new_trainer(tmp_path, at_the_event(fill_the_disk), callback, Room(), max_epochs=EPOCHS)
    torch.manual_seed(0)
    try:
        with pytest.warns(UserWarning, match=r"cut\.ckpt in .* could not be written \(OSError: .*File too large"):
            trainer.fit(new_module(adam), loader(), loader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept[1] == (kept[0], ["dense"])
    assert callback.state_dict()["applied"] == EVENTS
    assert list(callback.snapshot_files) == ["dense", "final"]
    assert same(finished(trainer)[:2], whole.end[:2])
