"""A file of every step and of every hook around a compression is resumed bit for bit."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from lr_callback import FactorizedLinear, LowRankCompression, LowRankMixin

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The callbacks that wrote the files are not needed to read them.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
EPOCHS, STEPS = 4, 4
EVENTS = {1: 0.6, 3: 0.35}
LAYERS = ["network.8", "network.10"]


def events():
    return LowRankCompression(list(EVENTS.values()), list(EVENTS), include=LAYERS, show_table=False)


def adam(module):
    optimizer = Adam(module.parameters(), lr=0.005)
    return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}


class Dice(Callback):
    """Keep the random state in the file, as Lightning does not, and put it back before the first batch."""

    def __init__(self):
        self.state = None

    def state_dict(self):
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state_dict):
        self.state = state_dict["state"]

    def on_train_batch_start(self, *_):
        if self.state is not None:
            torch.set_rng_state(self.state)
            self.state = None


class SaveIn(Callback):
    """Save a file in some hooks, named after the hook, the epoch and the step."""

    def __init__(self, prefix, *hooks):
        for hook in hooks:
            setattr(self, hook, lambda trainer, *_, name=f"{prefix}{hook}": self.save(trainer, name))

    def save(self, trainer, name):
        path = Path(trainer.default_root_dir) / f"{name}-{trainer.current_epoch}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)


class Broke(Exception):
    pass


class Breaks(Callback):
    """Fail in a hook at one step."""

    def __init__(self, hook, step):
        def fail(trainer, *_):
            if trainer.global_step == step:
                if hook == "on_train_batch_start":
                    trainer.train_dataloader.done -= 1  # the batch was given out, but not trained
                raise Broke

        setattr(self, hook, fail)


def ended(trainer, watch):
    """Return all that a run leaves behind."""
    loops = trainer.fit_loop.state_dict()
    counters = {name: loops[name] for name in loops if "val_loop" not in name}
    [schedule] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    optimizer = trainer.optimizers[0].state_dict()
    random = torch.get_rng_state()
    return copy.deepcopy(
        SimpleNamespace(
            weights=dict(trainer.lightning_module.state_dict()),
            optimizer=optimizer,
            schedule=schedule,
            random=random,
            counters=counters,
            losses=watch.losses,
        )
    )


@pytest.fixture(scope="module")
def train(loader, new_module, new_trainer, new_watch):
    """Return a function that trains with dropout, from the beginning or from a file, and returns what is left."""

    def run(root, ckpt_path=None, before=(), after=(), seed=9, module=None, compression=None, **settings):
        watch, module = new_watch(), new_module(adam, dropout=0.3) if module is None else module
        callbacks = [*before, events() if compression is None else compression, *after, Dice(), watch]
        settings = {"max_epochs": EPOCHS, "limit_val_batches": 1, **settings}
        trainer = new_trainer(root, *callbacks, enable_checkpointing=True, **settings)
        torch.manual_seed(seed)
        loaders = [loader(), loader()]
        for one in loaders:
            one.generator = torch.Generator()  # or making an iterator would draw from the state that dropout draws from
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        return ended(trainer, watch)

    return run


@pytest.fixture(scope="session")
def equal(same):
    """Return a function that checks what a resumed run leaves behind against the uninterrupted one."""

    def check(found, expected):
        for name in ("weights", "optimizer", "schedule", "random", "counters"):
            assert same(getattr(found, name), getattr(expected, name)), name
        assert found.losses == expected.losses[len(expected.losses) - len(found.losses) :]

    return check


HOOKS, ENDS = ["on_train_epoch_start"], ["on_train_epoch_end", "on_validation_end"]
FILES = [
    *(f"epoch={step // STEPS}-step={step + 1}.ckpt" for step in range(EPOCHS * STEPS - 1)),
    *(f"{side} {HOOKS[0]}-{epoch}-{epoch * STEPS}.ckpt" for side in ("before", "after") for epoch in range(EPOCHS)),
    *(f"after {hook}-{epoch}-{epoch * STEPS + STEPS}.ckpt" for hook in ENDS for epoch in range(EPOCHS - 1)),
]


@pytest.fixture(scope="module", params=[{}, {"max_steps": EPOCHS * STEPS}], ids=["epochs", "steps"])
def whole(request, train, tmp_path_factory):
    """Return an uninterrupted run that wrote a file at every step and in the hooks around it."""
    root = tmp_path_factory.mktemp("whole")
    steps = ModelCheckpoint(root, save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    savers = [SaveIn("before ", *HOOKS)], [SaveIn("after ", *HOOKS, *ENDS), steps]
    return SimpleNamespace(root=root, limit=request.param, end=train(root, None, *savers, seed=0, **request.param))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.situation("Checkpoints", "resume from any step and any hook, with several compressions", "works")
def test_file_of_any_moment_is_resumed_bit_for_bit(whole, train, tmp_path, name, equal):
    equal(train(tmp_path, whole.root / name, **whole.limit), whole.end)


CRASHES = [
    *(("on_train_batch_start", step) for step in range(EPOCHS * STEPS)),
    *(("on_train_batch_end", step + 1) for step in (0, 3, 5, 11, 12)),
    *(("on_train_epoch_start", STEPS * epoch) for epoch in range(EPOCHS)),
    *(("on_validation_start", STEPS * epoch) for epoch in (1, 3)),
]


@pytest.mark.parametrize(("hook", "step"), CRASHES, ids=str)
@pytest.mark.parametrize("whole", [{}], indirect=True, ids=["epochs"])
@pytest.mark.situation("Checkpoints", "ModelCheckpoint(save_on_exception=True) of a crash at any step", "works")
def test_crash_at_any_step_is_resumed_from_the_file_of_that_moment(whole, train, tmp_path, hook, step, equal):
    saver = ModelCheckpoint(tmp_path, "crashed", save_on_exception=True, every_n_epochs=EPOCHS, save_top_k=-1)
    with pytest.raises(Broke):
        train(tmp_path, None, [Breaks(hook, step)], [saver], seed=0)
    path = tmp_path / "crashed.ckpt"
    if step == 0:  # Lightning keeps no file of a run that has not made a step
        assert not path.exists()
        return
    found, expected = train(tmp_path, path), copy.deepcopy(whole.end)
    if hook == "on_train_batch_start":
        # Lightning counts the batch that broke off twice.
        for end in (found, expected):
            end.counters = end.counters["epoch_progress"]
    equal(found, expected)


def without(new_trainer, loader, root, module, path, epochs):
    """Train on without the callback."""
    trainer = new_trainer(root, max_epochs=epochs)
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    trainer.save_checkpoint(root / "without.ckpt")
    return trainer


@pytest.fixture
def cut_module(new_module):
    class Cut(LowRankMixin, new_module):
        pass

    return Cut


@pytest.mark.parametrize("whole", [{}], indirect=True, ids=["epochs"])
@pytest.mark.situation("Checkpoints", "resume without the callback, and with it again", "works")
def test_event_that_passed_without_the_callback_comes_with_it(whole, train, loader, new_module, new_trainer, tmp_path):
    path = whole.root / "after on_train_epoch_end-0-4.ckpt"
    without(new_trainer, loader, tmp_path, new_module(adam), path, 2)
    compression = LowRankCompression(EVENTS[1], 1, include=LAYERS, show_table=False)
    train(tmp_path, tmp_path / "without.ckpt", compression=compression)
    assert compression.state_dict()["applied"] == [1]
    assert compression.allocation.keep_ratio == EVENTS[1]


@pytest.mark.parametrize("whole", [{}], indirect=True, ids=["epochs"])
def test_compressed_run_goes_on_without_the_callback_where_the_module_takes_the_structure(
    whole, train, loader, cut_module, new_trainer, tmp_path
):
    path = whole.root / "after on_train_epoch_end-1-8.ckpt"
    trainer = without(new_trainer, loader, tmp_path, cut_module(adam), path, 3)
    assert type(trainer.lightning_module.network[8]) is FactorizedLinear
    compression = events()
    train(tmp_path, tmp_path / "without.ckpt", compression=compression)
    assert compression.state_dict()["applied"] == [1, 3]
    assert compression.allocation.keep_ratio == EVENTS[3]


CHANGES = {
    "a later event has passed by then": ([1, 2], [0.6, 0.3], [1, 2], 0.3),
    "an earlier event than those that were": ([0], [0.2], [1], 0.6),
    "another fraction for an event that was": ([1], [0.2], [1], 0.6),
    "another fraction for an event to come": ([1, 3], [0.6, 0.2], [1, 3], 0.2),
    "no event that was": ([3], [0.2], [1, 3], 0.2),
}


@pytest.mark.parametrize(("epochs", "ratios", "applied", "kept"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("whole", [{}], indirect=True, ids=["epochs"])
@pytest.mark.situation("Checkpoints", "resume with other epochs or fractions", "works")
def test_other_arguments_hold_for_what_comes_after_the_last_event_that_was(
    whole, train, tmp_path, epochs, ratios, applied, kept
):
    compression = LowRankCompression(ratios, epochs, include=LAYERS, show_table=False)
    train(tmp_path, whole.root / "after on_train_epoch_end-2-12.ckpt", compression=compression)
    assert compression.state_dict()["applied"] == applied
    assert compression.allocation.keep_ratio == kept
