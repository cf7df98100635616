"""Schedulers keep the trajectory that they would have had without a cut, or start again where that is asked for."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR

from lr_callback import ALDS, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
CUTS = [1, 3]
EPOCHS = 5
STEPS = 4 * EPOCHS


class Decay:
    """A rule with a state of its own, which LambdaLR writes to checkpoints; functions it does not."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, step):
        return self.factor**step


def in_turn(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.2, total_iters=3)
    cold = lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 3)
    return lr_scheduler.SequentialLR(optimizer, [warm, cold], milestones=[3])


def chained(optimizer):
    constant = lr_scheduler.ConstantLR(optimizer, 0.3, total_iters=5)
    return lr_scheduler.ChainedScheduler([constant, lr_scheduler.ExponentialLR(optimizer, 0.95)], optimizer=optimizer)


def rising_after_six(step):
    return 0.9 if step < 6 else 1.05


# Each is stepped at each batch, so that it stands in the middle of its course at both cuts.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, Decay(0.8)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, rising_after_six),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 13], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.9, total_iters=10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
    "SequentialLR": in_turn,
    "ChainedScheduler": chained,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.2, 0.1], total_steps=STEPS + 1),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.2, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "CyclicLR, a rule of one's own": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, scale_fn=Decay(0.7)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2, cooldown=1),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.01, 0.2], anneal_epochs=9),
}
BASES = {"LRScheduler", "_LRScheduler"}
SITUATIONS = [
    pytest.param(name, marks=pytest.mark.situation("Schedulers", name, "works"), id=name) for name in SCHEDULERS
]
REWOUND = [
    pytest.param(name, marks=pytest.mark.situation("Schedulers, learning_rate_rewind", name, "works"), id=name)
    for name in SCHEDULERS
]


def test_every_scheduler_of_torch_is_tried():
    kinds = [one for one in vars(lr_scheduler).values() if isinstance(one, type)]
    there = {one.__name__ for one in kinds if issubclass(one, lr_scheduler.LRScheduler)}
    assert there - {name.partition(",")[0] for name in SCHEDULERS} - BASES == set()


def scheduled(name, interval="step", make=SCHEDULERS, **how):
    """Return what makes an optimizer with two groups and this scheduler."""

    def optimize(module):
        norms = [one for one in module.parameters() if one.dim() == 1]
        others = [one for one in module.parameters() if one.dim() > 1]
        groups = [{"params": norms, "lr": 0.1}, {"params": others}]
        # CyclicLR and OneCycleLR turn Adam's betas, and SGD's momentum.
        optimizer = AdamW(groups, lr=0.05) if name == "OneCycleLR" else SGD(groups, lr=0.05, momentum=0.9)
        scheduler = {"scheduler": make[name](optimizer), "interval": interval, "monitor": "constant", **how}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return optimize


class Rates(Callback):
    """Note what schedulers have set, at each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        options = ("lr", "momentum", "betas")
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        self.seen.append([{name: copied(group[name]) for name in options if name in group} for group in groups])


def copied(value):
    return float(value) if isinstance(value, torch.Tensor) else value


def compression(**options):
    return LowRankCompression([0.6, 0.4], CUTS, method=ALDS(), refit=None, show_table=False, **options)


def rates(fit, module, *callbacks, **settings):
    watch = Rates()
    fit(module, *callbacks, watch, max_epochs=EPOCHS, **settings)
    assert len(watch.seen) == STEPS
    return watch.seen


@pytest.mark.parametrize("name", SITUATIONS)
def test_trajectory_is_that_of_a_run_without_the_callback(name, fit, new_module):
    alone = rates(fit, new_module(scheduled(name)))
    assert len({str(seen) for seen in alone}) > 1
    assert rates(fit, new_module(scheduled(name)), compression()) == alone


@pytest.mark.parametrize("name", REWOUND)
def test_rewound_trajectory_starts_again_at_each_cut(name, fit, new_module):
    alone = rates(fit, new_module(scheduled(name)))
    expected = alone[:4] + alone[:8] + alone[:8]
    assert expected != alone
    assert rates(fit, new_module(scheduled(name)), compression(learning_rate_rewind=True)) == expected


@pytest.mark.parametrize("name", ["StepLR", "ReduceLROnPlateau", "SequentialLR"])
@pytest.mark.parametrize("rewound", [False, True])
def test_the_same_holds_for_schedulers_that_step_once_an_epoch(name, rewound, fit, new_module):
    make = {
        "StepLR": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
        "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "SequentialLR": in_turn,
    }
    optimize = scheduled(name, "epoch", make)
    alone = rates(fit, new_module(optimize))
    expected = alone[:4] + alone[:8] + alone[:8] if rewound else alone
    assert len({str(seen) for seen in alone}) > 1
    assert rates(fit, new_module(optimize), compression(learning_rate_rewind=rewound)) == expected


def test_rates_without_a_scheduler_that_were_set_by_hand_are_rewound(fit, new_module):
    class Halve(Callback):
        def on_train_batch_end(self, trainer, *_):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] /= 2

    seen = rates(fit, new_module(), Halve(), compression(learning_rate_rewind=True))
    found = [groups[0]["lr"] for groups in seen]
    assert found == [0.05 / 2**step for length in (4, 8, 8) for step in range(length)]


@pytest.mark.situation("Schedulers", "several optimizers, manual optimization", "works")
def test_schedulers_that_are_stepped_by_hand_are_rewound(fit, new_module):
    class Manual(new_module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for one in self.optimizers():
                one.zero_grad()
            self.manual_backward(loss)
            for one, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                one.step()
                schedule.step()

        def configure_optimizers(self):
            parts = [self.network[:6].parameters(), self.network[6:].parameters()]
            made = [Adam(parts[0], lr=torch.tensor(0.01), foreach=False), SGD(parts[1], lr=0.05)]
            return made, [lr_scheduler.ExponentialLR(made[0], 0.9), lr_scheduler.StepLR(made[1], 3)]

    alone = rates(fit, Manual())
    assert rates(fit, Manual(), compression()) == alone
    expected = alone[:4] + alone[:8] + alone[:8]
    assert rates(fit, Manual(), compression(learning_rate_rewind=True)) == expected


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau", "LambdaLR"])
@pytest.mark.parametrize("moment", ["before", "in the epoch of the first cut", "after"])
def test_a_rewound_run_resumes_bit_for_bit(name, moment, tmp_path, loader, new_module, new_trainer, fit):
    file = {"before": "epoch=0-step=3", "in the epoch of the first cut": "epoch=1-step=6", "after": "epoch=2-step=9"}
    # Lightning writes a file within an epoch before ReduceLROnPlateau makes its step of that batch.
    optimize = scheduled(name, "epoch" if name == "ReduceLROnPlateau" else "step")
    writer = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=3)
    module = new_module(optimize)
    whole = fit(module, compression(learning_rate_rewind=True), writer, max_epochs=EPOCHS, enable_checkpointing=True)
    again = new_trainer(tmp_path, compression(learning_rate_rewind=True), max_epochs=EPOCHS)
    again.fit(new_module(optimize), loader(), loader(), ckpt_path=tmp_path / f"{file[moment]}.ckpt")
    expected, found = (one.lightning_module.state_dict() for one in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    states = [one.lr_scheduler_configs[0].scheduler.state_dict() for one in (whole, again)]
    assert str(states[0]) == str(states[1])


def test_the_start_of_the_run_is_that_of_the_file_whatever_the_configuration_says_now(
    tmp_path, loader, new_module, new_trainer, fit
):
    writer = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    optimize = scheduled("ExponentialLR")
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True}
    fit(new_module(optimize), compression(learning_rate_rewind=True), writer, **settings)

    def lower(module):
        made = optimize(module)
        for group in made["optimizer"].param_groups:
            group["lr"] /= 100
        return made

    watch = Rates()
    again = new_trainer(tmp_path, compression(learning_rate_rewind=True), watch, max_epochs=EPOCHS)
    again.fit(new_module(lower), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert watch.seen[0][1]["lr"] == 0.05  # of the cut at epoch 3


def test_rewinding_can_begin_with_a_run_that_is_resumed(tmp_path, loader, new_module, new_trainer, fit):
    writer, optimize = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), scheduled("ExponentialLR")
    fit(new_module(optimize), compression(), writer, max_epochs=EPOCHS, enable_checkpointing=True)
    watch = Rates()
    again = new_trainer(tmp_path, compression(learning_rate_rewind=True), watch, max_epochs=EPOCHS)
    again.fit(new_module(optimize), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [groups[1]["lr"] for groups in watch.seen[:2]] == [0.05, 0.05 * 0.9]


def test_a_rate_that_was_found_is_what_the_run_begins_with(fit, new_module):
    module = new_module(lambda one: SGD(one.parameters(), lr=one.lr))
    module.lr = 0.123
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    seen = rates(fit, module, compression(learning_rate_rewind=True), finder, enable_checkpointing=True)
    assert module.lr != 0.123
    assert {groups[0]["lr"] for groups in seen} == {module.lr}


def test_a_scheduler_that_cannot_be_rewound_ends_the_run_and_nothing_is_changed(fit, new_module):
    class Broken(lr_scheduler.ExponentialLR):
        def load_state_dict(self, state_dict):
            if state_dict["last_epoch"] == 0:
                raise RuntimeError("no way back")
            super().load_state_dict(state_dict)

    module, kept = new_module(scheduled("broken", make={"broken": lambda o: Broken(o, 0.5)})), {}

    class Kept(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
            kept.update(layers=list(module.network), state=str((optimizer.state_dict(), schedule.state_dict())))
            kept.update(optimizer=optimizer, schedule=schedule)

    with pytest.raises(RuntimeError, match="no way back"):
        fit(module, Kept(), compression(learning_rate_rewind=True), max_epochs=EPOCHS)
    assert list(map(id, module.network)) == list(map(id, kept["layers"]))
    assert str((kept["optimizer"].state_dict(), kept["schedule"].state_dict())) == kept["state"]


def test_a_file_of_a_run_with_another_number_of_schedulers_is_refused_before_training(
    tmp_path, loader, new_module, new_trainer, fit
):
    writer = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    optimize = scheduled("ExponentialLR")
    fit(
        new_module(optimize),
        compression(learning_rate_rewind=True),
        writer,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
    )
    again = new_trainer(tmp_path, compression(learning_rate_rewind=True), max_epochs=EPOCHS)
    bare = new_module(lambda module: optimize(module)["optimizer"])
    with pytest.raises(ValueError, match=r"the optimizers, groups and schedulers that it began with, it began with"):
        again.fit(bare, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.global_step == 0
