"""Lightning's other callbacks together with a compression: each does what it does without one."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD
from torch.utils.data import DataLoader

from lr_callback import FactorizedConv2d, FactorizedLinear, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    # A search for a batch size at a later epoch goes back into the middle of the last one.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Lightning says so of every `fit` with OnExceptionCheckpoint.
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint"),
]


def compression(*epochs, **settings):
    epochs = epochs or (1, 3)
    return LowRankCompression([0.6, 0.35][: len(epochs)], list(epochs), show_table=False, **settings)


def is_compressed(module):
    return any(isinstance(one, (FactorizedLinear, FactorizedConv2d)) for one in module.modules())


BOTH_ORDERS = pytest.mark.parametrize("first", [True, False], ids=["other first", "compression first"])


def in_order(other, first, *epochs):
    return [other, compression(*epochs)] if first else [compression(*epochs), other]


@pytest.mark.situation("Other callbacks", "ModelPruning", "refused")
@BOTH_ORDERS
def test_pruning_is_refused_before_training_with_the_way_out(fit, new_module, new_watch, first):
    class Pruning(ModelPruning):
        pass

    watch = new_watch()
    for kind in (ModelPruning, Pruning):
        pruning = kind("l1_unstructured", amount=0.1, parameters_to_prune=None)
        with pytest.raises(MisconfigurationException, match=f"no ModelPruning, got {kind.__name__}.*Prune in a run of"):
            fit(new_module(), *in_order(pruning, first), watch)
    assert watch.losses == []


class Tunable:
    """What the tuners ask of a module: a rate, a batch size and loaders that follow it."""

    lr, batch_size = 0.05, 64


@pytest.fixture(scope="module")
def new_tunable(new_module, digits):
    class Module(Tunable, new_module):
        def configure_optimizers(self):
            return SGD(self.parameters(), lr=self.lr, momentum=0.9)

        def train_dataloader(self):
            return DataLoader(digits, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    return Module


class RatesAtEpochs(LearningRateFinder):
    """Look for a rate at the start of some epochs, as in Lightning's documentation."""

    def __init__(self, *milestones):
        super().__init__(num_training_steps=8, min_lr=1e-4, max_lr=0.5)
        self.milestones, self.found = milestones, {}

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)
            self.found[trainer.current_epoch] = len(self.optimal_lr.results["lr"])


class SizesAtEpochs(BatchSizeFinder):
    """Look for a batch size at the start of some epochs."""

    def __init__(self, *milestones):
        super().__init__(mode="power", steps_per_trial=1, init_val=8, max_trials=1)
        self.milestones, self.found = milestones, {}

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.milestones:
            self.scale_batch_size(trainer, pl_module)
            self.found[trainer.current_epoch] = pl_module.batch_size


FINDERS = {
    "rate": lambda: LearningRateFinder(num_training_steps=8, min_lr=1e-4, max_lr=0.5),
    "rate, at each epoch": lambda: RatesAtEpochs(0, 1, 2, 3),
    "batch size": lambda: BatchSizeFinder(mode="power", steps_per_trial=1, init_val=8, max_trials=1),
    "batch size, at some epochs": lambda: SizesAtEpochs(1, 3),
}


def found_by(trainer, finder, watch):
    """Return what a finder did to the run: rates, sizes, batches that were trained, steps."""
    found = trainer.lightning_module.batch_size, getattr(finder, "found", None)
    return found, list(watch.parameters), trainer.global_step, trainer.current_epoch


@pytest.fixture(scope="module")
def alone(tmp_path_factory, new_trainer, new_tunable, new_watch):
    """Return what each finder does in a run without a compression.

    In Lightning 2.6.6 a search for a rate finds nothing after the first epoch, and one for a batch size ends the epoch.
    """

    def run(name):
        finder, watch, root = FINDERS[name](), new_watch(), tmp_path_factory.mktemp("alone")
        trainer = new_trainer(root, finder, watch, max_epochs=4, enable_checkpointing=True)
        trainer.fit(new_tunable())
        return found_by(trainer, finder, watch)

    return {name: run(name) for name in FINDERS}


@pytest.mark.situation("Other callbacks", "LearningRateFinder and BatchSizeFinder, also at a compression", "works")
@BOTH_ORDERS
@pytest.mark.parametrize("epochs", [(0, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("name", FINDERS)
def test_finder_does_what_it_does_alone(alone, fit, new_tunable, new_watch, new_trainer, tmp_path, first, epochs, name):
    module, watch, finder = new_tunable(), new_watch(), FINDERS[name]()
    trainer = new_trainer(tmp_path, *in_order(finder, first, *epochs), watch, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module)
    assert found_by(trainer, finder, watch) == alone[name]
    assert watch.strangers == []
    assert watch.parameters[3, "end"] < watch.parameters[2, "end"]
    dense = sum(one.numel() for one in new_tunable().parameters())
    assert (watch.first(0) < dense) is (epochs[0] == 0)


@pytest.mark.situation("Other callbacks", "LearningRateMonitor", "works")
@pytest.mark.parametrize("interval", ["step", "epoch", None])
def test_rate_monitor_logs_the_same_names_throughout(fit, new_module, tmp_path, read_metrics, interval):
    def groups(module):
        named = dict(module.named_parameters())
        norms = [one for name, one in named.items() if ".1." in name or ".4." in name]
        others = [one for name, one in named.items() if not (".1." in name or ".4." in name)]
        optimizer = SGD(
            [{"params": norms, "name": "norms"}, {"params": others, "name": "others"}], lr=0.1, momentum=0.9
        )
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    monitor = LearningRateMonitor(interval, log_momentum=True)
    trainer = fit(new_module(groups), compression(), monitor, logger=CSVLogger(tmp_path), max_epochs=5)
    written = read_metrics(trainer.log_dir)
    assert set(monitor.lrs) == {"lr-SGD/norms", "lr-SGD/others"}
    assert set(written) >= {"lr-SGD/norms-momentum", "lr-SGD/others-momentum"}
    found = list(written["lr-SGD/others"].values())
    assert sorted(set(found), reverse=True) == [0.1 * 0.5**epoch for epoch in range(5)]


@pytest.mark.situation("Other callbacks", "ModelSummary, RichModelSummary", "works")
@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
@pytest.mark.parametrize("epoch", [0, 1])
def test_summary_is_printed_once(fit, new_module, capsys, messages, summary, epoch):
    module = new_module()
    fit(module, summary(max_depth=3), compression(epoch))
    printed = capsys.readouterr().out + "\n".join(messages)
    assert printed.count("Trainable params") == 1
    assert is_compressed(module)


@pytest.mark.situation("Other callbacks", "ThroughputMonitor", "works")
def test_throughput_is_measured_across_a_compression(fit, new_module, tmp_path, read_metrics, digits):
    class Counted(new_module):
        def setup(self, stage):
            def forward():
                return self(torch.zeros(64, 1, 8, 8))

            self.flops_per_batch = measure_flops(self, forward)

    monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2)
    trainer = fit(Counted(), compression(), monitor, logger=CSVLogger(tmp_path), max_epochs=4)
    written = read_metrics(trainer.log_dir)
    assert max(written["train/device/flops_per_sec"]) == 15
    assert all(value > 0 for value in written["train/device/batches_per_sec"].values())


@pytest.mark.situation("Other callbacks", "RichProgressBar, TQDMProgressBar", "works")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("epoch", [0, 2])
def test_progress_bar(fit, new_module, capsys, bar, epoch):
    module = new_module()
    compress = LowRankCompression(0.5, epoch)
    fit(module, bar(), compress, enable_progress_bar=True)
    printed = capsys.readouterr()
    assert f"Low-rank compression at the start of epoch {epoch}" in printed.out + printed.err
    assert is_compressed(module)


def lambdas(called):
    names = [name for name in dir(Callback) if name.startswith("on_train_epoch")]
    return LambdaCallback(**{name: (lambda *_, name=name, **__: called.append(name)) for name in names})


@pytest.mark.situation("Other callbacks", "LambdaCallback", "works")
@BOTH_ORDERS
def test_lambda_callback(fit, new_module, first):
    module, called = new_module(), []
    fit(module, *in_order(lambdas(called), first), max_epochs=4)
    assert called == ["on_train_epoch_start", "on_train_epoch_end"] * 4
    assert is_compressed(module)


OTHERS = {
    "GradientAccumulationScheduler": lambda root: GradientAccumulationScheduler({0: 1, 1: 2, 3: 4}),
    "Timer": lambda root: Timer(duration={"hours": 1}, interval="step"),
    "OnExceptionCheckpoint": OnExceptionCheckpoint,
    "ModelCheckpoint": lambda root: ModelCheckpoint(root / "files"),
}


@pytest.mark.situation("Other callbacks", "GradientAccumulationScheduler, Timer, OnExceptionCheckpoint", "works")
@BOTH_ORDERS
@pytest.mark.parametrize("name", OTHERS)
def test_other_callback_runs_along(fit, new_module, new_watch, tmp_path, first, name):
    module, watch = new_module(), new_watch()
    other = OTHERS[name](tmp_path)
    trainer = fit(
        module, *in_order(other, first), watch, max_epochs=5, logger=CSVLogger(tmp_path), enable_checkpointing=True
    )
    assert watch.strangers == []
    assert watch.first(4) < watch.first(2) < watch.first(0)
    assert trainer.global_step == (20 if name != "GradientAccumulationScheduler" else 4 + 2 + 2 + 1 + 1)
    if name == "Timer":
        assert other.time_elapsed() > 0


@pytest.mark.situation("Other callbacks", "DeviceStatsMonitor", "works")
def test_device_statistics_are_logged_throughout(fit, new_module, tmp_path, read_metrics):
    pytest.importorskip("psutil")
    trainer = fit(new_module(), compression(), DeviceStatsMonitor(True), logger=CSVLogger(tmp_path), max_epochs=4)
    percent = read_metrics(trainer.log_dir)["DeviceStatsMonitor.on_train_batch_end/cpu_percent"]
    assert len(percent) == 16
