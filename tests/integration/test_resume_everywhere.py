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

from lr_callback import LowRankCompression

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
            if trainer.global_step == step and not trainer.sanity_checking:
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


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def train(loader, new_module, new_trainer, new_watch):
    """Return a function that trains with dropout, from the beginning or from a file, and returns what is left."""

    def run(root, ckpt_path=None, before=(), after=(), seed=9, **settings):
        watch, module = new_watch(), new_module(adam, dropout=0.3)
        callbacks = [*before, events(), *after, Dice(), watch]
        settings = {"max_epochs": EPOCHS, "limit_val_batches": 1, **settings}
        trainer = new_trainer(root, *callbacks, enable_checkpointing=True, **settings)
        torch.manual_seed(seed)
        loaders = [loader(), loader()]
        for one in loaders:
            one.generator = torch.Generator()  # or making an iterator would draw from the state that dropout draws from
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        return ended(trainer, watch)

    return run


def equal(found, expected, losses=None):
    """Check what a resumed run leaves behind against the uninterrupted one."""
    for name in ("weights", "optimizer", "schedule", "random", "counters"):
        assert same(getattr(found, name), getattr(expected, name)), name
    assert found.losses == expected.losses[len(expected.losses) - len(found.losses) :]
    assert losses is None or len(found.losses) == losses


HOOKS, ENDS = ["on_train_epoch_start"], ["on_train_epoch_end", "on_validation_end"]
FILES = [
    *(f"epoch={step // STEPS}-step={step + 1}.ckpt" for step in range(EPOCHS * STEPS - 1)),
    *(f"{side} {HOOKS[0]}-{epoch}-{epoch * STEPS}.ckpt" for side in ("before", "after") for epoch in range(EPOCHS)),
    *(f"after {hook}-{epoch}-{epoch * STEPS + STEPS}.ckpt" for hook in ENDS for epoch in range(EPOCHS - 1)),
]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Return an uninterrupted run that wrote a file at every step and in the hooks around it."""
    root = tmp_path_factory.mktemp("whole")
    steps = ModelCheckpoint(root, save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    end = train(root, None, [SaveIn("before ", *HOOKS)], [SaveIn("after ", *HOOKS, *ENDS), steps], seed=0)
    return SimpleNamespace(root=root, end=end)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.situation("Checkpoints", "resume from any step and any hook, with several compressions", "works")
def test_file_of_any_moment_is_resumed_bit_for_bit(whole, train, tmp_path, name):
    equal(train(tmp_path, whole.root / name), whole.end)
