"""Averages of the weights, held by other callbacks, are compressed along with the model, in its basis."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import AveragedModel

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning"),
]
EPOCHS = 6
EVENTS = ([0.6, 0.35], [2, 4])


class OncePerEpoch(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


AVERAGES = {
    "WeightAveraging": WeightAveraging,
    "WeightAveraging, once an epoch, buffers apart": lambda: OncePerEpoch(use_buffers=False),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.8),
    "EMAWeightAveraging, late": lambda: EMAWeightAveraging(decay=0.8, update_starting_at_step=13),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2),
    "StochasticWeightAveraging, late": lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=4),
}


def compression():
    return LowRankCompression(*EVENTS, method=ALDS(), refit=None, show_table=False)


def ordered(average, before):
    return [average, compression()] if before else [compression(), average]


def average_of(callback):
    found = callback._average_model
    return getattr(found, "module", found) if isinstance(found, AveragedModel) else found


def structure(module):
    return {name: tuple(one.shape) for name, one in module.named_parameters()}


class Compare(Callback):
    """Note at each batch's end whether the average has the model's structure and, after a cut, its encoders."""

    def __init__(self, average):
        self.average, self.same, self.cuts = average, [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        other = average_of(self.average)
        self.same.append(structure(other) == structure(pl_module))
        encoders = {name: value for name, value in pl_module.named_parameters() if "encoder" in name}
        if batch_idx == 0 and trainer.current_epoch in EVENTS[1]:
            held = dict(other.named_parameters())
            self.cuts[trainer.current_epoch] = [torch.equal(held[name], value) for name, value in encoders.items()]


def finished(trainer, average):
    held = average_of(average).state_dict()
    return [trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict(), held, average.state_dict()]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module", params=AVERAGES)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["average first", "compression first"])
def run(request, kind, tmp_path_factory, loader, new_module, new_trainer):
    """Return an uninterrupted run with two cuts that wrote a file after each epoch."""
    root, average = tmp_path_factory.mktemp("whole"), AVERAGES[kind]()
    compare, module = Compare(average), new_module()
    files = [
        ModelCheckpoint(root, "{epoch}", save_top_k=-1),
        ModelCheckpoint(root, "mid-{step}", save_top_k=-1, every_n_train_steps=5),
    ]
    trainer = new_trainer(
        root, *ordered(average, request.param), compare, *files, max_epochs=EPOCHS, enable_checkpointing=True
    )
    trainer.fit(module, loader(), loader())
    end = copy.deepcopy(finished(trainer, average))
    return SimpleNamespace(
        kind=kind, before=request.param, root=root, end=end, compare=compare, average=average, module=module
    )


@pytest.mark.situation("Other callbacks", "weight averaging, before or after in the list", "works")
def test_average_has_the_models_structure_at_every_batch_and_its_encoders_at_each_cut(run):
    assert run.compare.same
    assert all(run.compare.same)
    assert list(run.compare.cuts) == EVENTS[1]
    assert all(equal and all(equal) for equal in run.compare.cuts.values())


def test_model_ends_with_the_average_compressed_and_finite(run):
    module = run.module
    assert {type(one) for one in module.modules()} >= {lrc.FactorizedConv2d, lrc.FactorizedLinear}
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    for one, other in zip(module.parameters(), average_of(run.average).parameters(), strict=True):
        assert torch.equal(one, other)


MOMENTS = ["epoch=0.ckpt", "mid-step=5.ckpt", "epoch=1.ckpt", "mid-step=10.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"]
"""Before the first cut, within an epoch, just before a cut, in the epoch of a cut, before the second, after it."""


@pytest.mark.situation("Other callbacks", "weight averaging, resumed before, between and after two cuts", "works")
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(run, moment, tmp_path, loader, new_module, new_trainer):
    average = AVERAGES[run.kind]()
    trainer = new_trainer(tmp_path, *ordered(average, run.before), max_epochs=EPOCHS)
    trainer.fit(new_module(), loader(), loader(), ckpt_path=run.root / moment)
    if run.kind == "StochasticWeightAveraging" and moment.startswith("mid"):
        # Lightning, also without this callback, restores its rates only at the start of an epoch.
        assert structure(trainer.lightning_module) == structure(run.module)
        return
    for resumed, uninterrupted in zip(finished(trainer, average), run.end, strict=True):
        assert same(resumed, uninterrupted)


class Holder(Callback):
    """Average what ``pick`` takes from the module after every batch."""

    def __init__(self, pick):
        self.pick, self.held = pick, None

    def setup(self, trainer, pl_module, stage):
        self.held = AveragedModel(self.pick(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.held.update_parameters(self.pick(pl_module))


@pytest.mark.situation("Other callbacks", "a callback of one's own with an AveragedModel", "works")
@pytest.mark.parametrize("pick", [lambda one: one, lambda one: one.network], ids=["module", "network"])
def test_average_of_a_callback_of_ones_own_follows(fit, new_module, pick):
    holder, module = Holder(pick), new_module()
    fit(module, holder, compression(), max_epochs=EPOCHS)
    assert holder.held.n_averaged == 4 * EPOCHS
    assert structure(holder.held.module) == structure(pick(module))
    assert any("encoder" in name for name in structure(holder.held.module))


def test_average_of_something_else_stays(fit, new_module):
    other = torch.nn.Linear(7, 7)
    holder = Holder(lambda one: other)
    fit(new_module(), holder, compression(), max_epochs=EPOCHS)
    assert list(structure(holder.held.module)) == ["weight", "bias"]


class Copying(LowRankCompression):
    """Also compress the copy of a callback that averages by hand."""

    def averages(self, trainer, pl_module):
        return [one.copied for one in trainer.callbacks if hasattr(one, "copied")]


class ByHand(Callback):
    def setup(self, trainer, pl_module, stage):
        self.copied = copy.deepcopy(pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for one, other in zip(self.copied.parameters(), pl_module.parameters(), strict=True):
            one.lerp_(other, 0.2)


@pytest.mark.parametrize("first", [True, False])
def test_copy_that_is_named_by_overriding_follows(fit, new_module, first):
    holder, module, compress = ByHand(), new_module(), Copying(*EVENTS, show_table=False)
    fit(module, *([holder, compress] if first else [compress, holder]), max_epochs=EPOCHS)
    assert structure(holder.copied) == structure(module)


class Teacher(Callback):
    def setup(self, trainer, pl_module, stage):
        self.teacher = copy.deepcopy(pl_module)


def test_plain_copy_such_as_a_teacher_stays_dense(fit, new_module):
    teacher = Teacher()
    fit(new_module(), teacher, compression(), max_epochs=EPOCHS)
    assert structure(teacher.teacher) == structure(new_module())


@pytest.mark.situation("Other callbacks", "an average of one of two modules that are alike", "refused")
def test_average_of_one_of_two_alike_is_refused_before_training(fit, new_module, new_watch):
    module, watch = new_module(), new_watch()
    module.network[0], module.network[1] = (
        torch.nn.Sequential(torch.nn.Conv2d(size, 8, 3, padding=1), torch.nn.BatchNorm2d(8)) for size in (1, 8)
    )
    module.network[2] = copy.deepcopy(module.network[1])
    expected = "one Sequential can be of network.1, network.2, which are alike"
    holder = Holder(lambda one: one.network[1])
    with pytest.raises(MisconfigurationException, match=expected):
        fit(module, holder, compression(), watch, max_epochs=EPOCHS)
    assert watch.losses == []


@pytest.mark.situation("Other callbacks", "an AveragedModel inside the module itself", "refused")
def test_average_inside_the_module_is_refused_before_training(fit, new_module, new_watch):
    module, watch = new_module(), new_watch()
    module.ema = AveragedModel(module.network)
    with pytest.raises(MisconfigurationException, match="found an AveragedModel as 'ema'"):
        fit(module, compression(), watch)
    assert watch.losses == []


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging, late"])
@pytest.mark.parametrize("first", [True, False])
def test_average_may_begin_in_a_run_resumed_after_a_cut(
    tmp_path, loader, new_module, new_trainer, name, first, recwarn
):
    writer = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    new_trainer(tmp_path, compression(), writer, max_epochs=3, enable_checkpointing=True).fit(
        new_module(), loader(), loader()
    )
    average, module = AVERAGES[name](), new_module()
    trainer = new_trainer(tmp_path, *ordered(average, first), max_epochs=EPOCHS)
    trainer.fit(module, loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert structure(average_of(average)) == structure(module)
    assert all(math.isfinite(value.sum()) for value in module.parameters())


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_average_is_as_before_when_the_cut_fails(fit, new_module, monkeypatch, name):
    average, module = AVERAGES[name](), new_module()
    seen = {}

    def remember_and_fail(*_):
        # Called in the middle of the cut, when the average has already been replaced.
        seen["cut"] = any("encoder" in key for key in structure(average_of(average)))
        raise KeyboardInterrupt

    class Before(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            held = average_of(average)
            seen["parameters"], seen["values"] = list(held.parameters()), copy.deepcopy(held.state_dict())

    monkeypatch.setattr("lr_callback.host.cut.retire", remember_and_fail)
    with pytest.raises(SystemExit):
        fit(module, average, Before(), LowRankCompression(0.5, 1, show_table=False))
    assert seen["cut"] is True
    held = average_of(average)
    assert all(one is other for one, other in zip(held.parameters(), seen["parameters"], strict=True))
    assert same(dict(held.state_dict()), dict(seen["values"]))
    assert structure(held) == structure(module) == structure(new_module())


@pytest.mark.situation("Other callbacks", "weight averaging and a refit, which the average takes over", "works")
@pytest.mark.parametrize("options", [{}, {"recalibrate_batchnorm": True}, {"refit": None}], ids=str)
def test_an_average_that_equals_the_model_does_so_after_its_repair(fit, new_module, options):
    def still(module):
        return torch.optim.SGD(module.parameters(), lr=0.0)

    average, seen = EMAWeightAveraging(decay=0.9), {}

    class Note(Callback):
        """Note how the average differs from the model before the cut and after it."""

        def on_train_epoch_start(self, trainer, pl_module):
            seen["before"] = differences(pl_module)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen["after"], seen["model"] = differences(pl_module), copy.deepcopy(pl_module.state_dict())

    def differences(module):
        held = average_of(average).state_dict()
        return {name: held[name] - value for name, value in module.state_dict().items() if value.is_floating_point()}

    fit(new_module(still), average, Note(), LowRankCompression(0.4, 1, show_table=False, **options), max_epochs=2)
    assert any("encoder" in name for name in seen["model"])
    statistics = [name for name in seen["after"] if "running" in name]
    assert any(seen["before"][name].any() for name in statistics), "those of the average lag behind"
    for name, value in seen["after"].items():
        expected = seen["before"][name] if name in statistics else torch.zeros_like(value)
        if not name.endswith("running_var"):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)
