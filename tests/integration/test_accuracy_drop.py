"""The smallest network whose accuracy is hardly lower, found by the run's own validation of copies of its module."""

import copy
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

import lr_callback as lrc
from lr_callback.cli import main
from lr_callback.model.find import factorized_in

PLAIN = {"method": lrc.ALDS(), "refit": None}
SEEN = []
"""What validations were told, of whichever copy of a module: an attribute would be one of the copy."""
NAME = "val_accuracy"
TRY = re.compile(rf"^Low-rank compression: keep ([\d.]+): {NAME} ([\d.]+) \(([+-][\d.]+)\)$", re.MULTILINE)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def weights(new_module, loader, new_trainer, tmp_path_factory):
    """Return those of a network that knows its digits, so that a cut costs something."""
    module = new_module()
    torch.manual_seed(0)
    new_trainer(tmp_path_factory.mktemp("trained"), max_epochs=25).fit(module, loader(shuffle=True), loader())
    return module.network.state_dict()


@pytest.fixture(scope="module")
def module_class(new_module, weights):
    class Judged(new_module):
        """Has metrics of its own, one of which nothing resets, and is told how to validate by the test."""

        def __init__(self, judge=None, dropout=0.0):
            super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.002, momentum=0.9), dropout)
            self.network.load_state_dict(weights)
            self.accuracy, self.batches_seen = MulticlassAccuracy(10, average="micro"), SumMetric()
            self.judge, self.notes = judge, []
            self.example_input_array = torch.zeros(64, 1, 8, 8)

        def training_step(self, batch, batch_idx):
            self.batches_seen.update(1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            scores = self(batch[0])
            self.batches_seen.update(1)
            self.notes.append(batch_idx)
            if self.judge is not None:
                return self.judge(self, scores)
            self.accuracy.update(scores, batch[1])
            self.log(NAME, self.accuracy)
            self.log("val_loss", F.cross_entropy(scores, batch[1]))
            return None

    return Judged


class Noting(lrc.LowRankCompression):
    """Notes what each compression kept."""

    def compress(self, *given):
        report = super().compress(*given)
        self.kept = [*getattr(self, "kept", []), self.allocation.keep_ratio]
        return report


OF_THE_CLOCK = ("compression/seconds", "compression/milliseconds_before", "compression/milliseconds_after")
OF_THE_SEARCH = (*OF_THE_CLOCK, "compression/accuracy_before", "compression/accuracy_after")
"""Names of metrics whose values a run that searches has of its own."""


def state_of(trainer, module):
    """Return everything that a try could have left a trace in."""
    callbacks = {type(one).__name__: one.state_dict() for one in trainer.callbacks if one.state_dict()}
    logged = {name: one for name, one in trainer.callback_metrics.items() if name not in OF_THE_SEARCH}
    return {
        "weights": dict(module.state_dict()),
        "modes": [one.training for one in module.modules()],
        "optimizers": [one.state_dict() for one in trainer.optimizers],
        "callbacks": callbacks,
        "logged": str(logged),  # a metric that is no number is equal to none
        "batches": module.batches_seen.compute(),
        "accuracy": vars(module.accuracy)["_update_count"],
        "notes": list(module.notes),
        "random": torch.get_rng_state(),
        "step": (trainer.global_step, trainer.current_epoch),
        "own": (module.trainer is trainer, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "signals": [id(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.mark.situation("Goals", "the smallest model within a drop of accuracy, found by trying", "works")
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"epochs": [1]}, {"num_sanity_val_steps": 2}),
        ({"epochs": [0], **PLAIN}, {}),
        ({"epochs": [1, 2], "recalibrate_batchnorm": True}, {"reload_dataloaders_every_n_epochs": 1}),
        (
            {"epochs": [1], "cost": "multiply_adds", "distill": 0.5},
            {"limit_val_batches": 0.5, "precision": "bf16-mixed"},
        ),
    ],
    ids=["default", "before the first validation", "twice", "multiply-adds"],
)
def test_the_run_is_that_with_the_ratio_that_was_found(
    fit, module_class, same, tmp_path, read_metrics, options, settings
):
    def run(**asked):
        files = ModelCheckpoint(tmp_path / "files", monitor=NAME, mode="max", enable_version_counter=False)
        stopping, callback = EarlyStopping(NAME, mode="max", patience=5), Noting(**options, **asked)
        module = module_class(dropout=0.3)
        torch.manual_seed(7)
        logger = CSVLogger(tmp_path / next(iter(asked)))
        more = {"enable_checkpointing": True, "logger": logger, **settings}
        trainer = fit(module, callback, files, stopping, shuffle=True, **more)
        assert factorized_in(module) and callback.kept[-1] < 1
        logged = read_metrics(logger.log_dir)
        measured = [logged.pop(name, None) for name in OF_THE_SEARCH][len(OF_THE_CLOCK) :]
        assert all(measured) or ("max_accuracy_drop" not in asked and not any(measured))
        return callback.kept, {**state_of(trainer, module), "loggers": logged}, files.best_model_path

    kept, own, file = run(max_accuracy_drop=0.05)
    written = torch.load(file, weights_only=True)["state_dict"]
    again, plain, same_file = run(keep_ratio=kept)
    assert again == kept and file == same_file
    assert same(written, torch.load(file, weights_only=True)["state_dict"])
    assert [name for name in own if not same(own[name], plain[name])] == []


def test_the_drop_is_held_as_another_trainer_measures_it(fit, module_class, loader, new_trainer, tmp_path, messages):
    callback = lrc.LowRankCompression(max_accuracy_drop=0.03, epochs=2, snapshots=True)
    fit(module_class(), callback)
    values = {}
    for name in ("dense", "cut"):
        other = module_class()
        lrc.restore_(other, callback.snapshot_files[name])
        (logged,) = new_trainer(tmp_path).validate(other, loader(), verbose=False)
        values[name] = logged[NAME]
    assert values["cut"] >= values["dense"] - 0.03 - 1e-6
    assert callback._accuracy.measured == pytest.approx((values["dense"], values["cut"]))
    tries = {float(ratio): (value, drop) for ratio, value, drop in TRY.findall("\n".join(messages))}
    assert 2 <= len(tries) <= 8
    kept = callback.allocation.keep_ratio
    assert tries[kept] == (f"{values['cut']:.4f}", f"{values['cut'] - values['dense']:+.4f}")
    assert kept == min(ratio for ratio, (_, drop) in tries.items() if float(drop) >= -0.03)
    [line] = [one for one in messages if "searching" in one]
    assert line == f"Low-rank compression: {NAME} is {values['dense']:.4f} and may fall by 0.03; searching"
    assert max(map(len, line.splitlines())) <= 80


@pytest.mark.situation(
    "Goals", "the smallest model within a drop of accuracy, resumed before and after the cut", "works"
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_goes_on_as_the_whole_one(module_class, loader, new_trainer, tmp_path, same, epoch):
    def run(folder, **start):
        files = ModelCheckpoint(tmp_path, filename=f"{folder}-{{epoch}}", save_top_k=-1)
        callback, module = lrc.LowRankCompression(max_accuracy_drop=0.05, epochs=1), module_class()
        trainer = new_trainer(tmp_path, callback, files, enable_checkpointing=True)
        trainer.fit(module, loader(), loader(), **start)
        return callback.allocation, dict(module.state_dict())

    whole = run("whole")
    resumed = run("resumed", ckpt_path=tmp_path / f"whole-epoch={epoch}.ckpt")
    assert resumed[0] == whole[0] and same(resumed[1], whole[1])


def test_nothing_is_printed_without_the_table_and_a_percentage_is_a_unit(fit, module_class, messages):
    def percent(module, scores):
        module.log("top1", 100.0 * (1 - len(factorized_in(module)) / 10))

    callback = lrc.LowRankCompression(max_accuracy_drop=25, monitor="top1", show_table=False, **PLAIN)
    fit(module_class(percent), callback)
    assert len(callback.allocation.factorized) == 2  # 20 points less; a third layer would make it 30
    assert [text for text in messages if "ompression" in text and "begin anew" not in text] == []


@pytest.mark.situation("Goals", "the smallest model within a drop of accuracy, where no smaller one holds it", "works")
def test_where_nothing_smaller_holds_all_stays_dense(fit, module_class):
    def only_dense(module, scores):
        module.log("acc", float(not factorized_in(module)))

    module, callback = module_class(only_dense), lrc.LowRankCompression(max_accuracy_drop=0.5)
    with pytest.warns(
        UserWarning, match=r"no smaller network that was tried has at most 0\.5 less acc; .* stays dense"
    ):
        fit(module, callback)
    assert callback.allocation.keep_ratio == 1 and not factorized_in(module)


def test_one_that_gives_no_number_does_not_hold(fit, module_class):
    def dense_or_nan(module, scores):
        module.log("acc", float("nan") if len(factorized_in(module)) > 2 else 1.0)

    callback = lrc.LowRankCompression(max_accuracy_drop=0.5, **PLAIN)
    fit(module_class(dense_or_nan), callback)
    assert len(callback.allocation.factorized) == 2


@pytest.mark.situation("Goals", "a drop of accuracy under fast_dev_run", "works")
def test_fast_dev_run_tries_on_one_batch(fit, module_class):
    SEEN.clear()
    module = module_class(lambda module, scores: (SEEN.append(module), module.log("acc", 0.5)))
    callback = lrc.LowRankCompression(max_accuracy_drop=0.01, epochs=9)
    fit(module, callback, fast_dev_run=True)
    assert factorized_in(module) and SEEN.pop() is module  # the run's own validation of one batch
    assert len(SEEN) == 2 and all(one is not module for one in SEEN)  # as it is, and the smallest


class Answering(lrc.LowRankCompression):
    def should_compress(self, trainer, pl_module):
        return {"max_accuracy_drop": 0.1} if trainer.current_epoch == 1 else None


def test_a_callback_that_chooses_its_moment_may_ask_for_it(fit, module_class):
    callback = Answering(**PLAIN)
    fit(module_class(), callback)
    assert 0 < callback.allocation.keep_ratio < 1


@pytest.mark.situation("Goals", "a drop of accuracy, of a compiled network", "works")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at those
@pytest.mark.parametrize("form", ["the module", "the module, in place", "the network", "the network, in place"])
def test_what_is_compiled_is_tried_as_it_is_written(fit, module_class, form):
    torch.compiler.reset()
    module = given = module_class()
    if form.endswith("in place"):
        (module if "module" in form else module.network).compile(backend="eager")
    elif form == "the network":
        module.network = torch.compile(module.network, backend="eager")
    else:
        given = torch.compile(module, backend="eager")
    callbacks = [lrc.LowRankCompression(max_accuracy_drop=0.1, **PLAIN) for _ in range(2)]
    fit(given, callbacks[0], max_epochs=2, limit_train_batches=1)
    fit(module_class(), callbacks[1], max_epochs=2, limit_train_batches=1)
    torch.compiler.reset()
    assert 0.1 < callbacks[0].allocation.keep_ratio == callbacks[1].allocation.keep_ratio


def test_workers_of_the_runs_loader_go_on(module_class, digits, new_trainer, tmp_path):
    loader = DataLoader(digits, batch_size=64, num_workers=1, persistent_workers=True)
    module, iterators = module_class(), []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            iterators.append(loader._iterator)

    callback = lrc.LowRankCompression(max_accuracy_drop=0.1, epochs=1, **PLAIN)
    new_trainer(tmp_path, Look(), callback, Look(), max_epochs=2).fit(module, DataLoader(digits, batch_size=64), loader)
    assert iterators[:2] == [None, None] and iterators[2] is iterators[3] is not None
    assert factorized_in(module)


def test_what_it_asks_for_is_checked(fit, module_class):
    callback = Answering(**PLAIN)
    callback.should_compress = lambda *_: {"max_accuracy_drop": -1}
    with pytest.raises(ValueError, match=r"`max_accuracy_drop` must be a number above 0, .* got -1"):
        fit(module_class(), callback)


class Data(LightningDataModule):
    """Moves images in a hook of its own, as its Trainer's stage tells, and counts what is done to it."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self.calls, self.stages = dataset, [], set()

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage.value}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage.value}")

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=64)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.stages.add(
            (type(self.trainer.loggers[0]).__name__, self.trainer.validating or self.trainer.sanity_checking)
        )
        return batch[0] + (0 if self.trainer.training else 1), batch[1]


@pytest.mark.situation("Goals", "a drop of accuracy, measured on the batches of a datamodule with hooks", "works")
def test_the_validation_is_told_what_it_is_told_in_the_run(module_class, digits, new_trainer, tmp_path):
    SEEN.clear()

    def look(module, scores):
        trainer = module.trainer
        datamodule = trainer.datamodule
        SEEN.append((trainer.current_epoch, trainer.global_step, module.current_epoch, trainer.max_epochs, datamodule))
        module.logger.experiment.add_image("digits", scores)
        assert trainer.validating and scores.is_inference() == trainer.validate_loop.inference_mode
        module.log("acc", 0.5)

    class Set(module_class):
        def setup(self, stage):
            self.calls = [*getattr(self, "calls", []), stage]
            if len(self.calls) > 1:
                self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def configure_callbacks(self):
            return [EarlyStopping("acc", mode="max", patience=9)]

    data, module = Data(digits), Set(look)
    callback = lrc.LowRankCompression(max_accuracy_drop=0.1, epochs=2)
    logger = CSVLogger(tmp_path)
    logger.experiment.add_image = lambda *_: None
    trainer = new_trainer(tmp_path, callback, logger=logger, limit_val_batches=2, inference_mode=False)
    trainer.fit(module, datamodule=data)
    assert [one[:4] for one in SEEN[4:8]] == [(2, 8, 2, 3)] * 4  # as it is, and the smallest network, two batches each
    assert len(SEEN) == 4 + 4 + 2
    assert all(
        one[4].dataset is digits and (one[4] is data) == (index not in range(4, 8)) for index, one in enumerate(SEEN)
    )
    assert data.trainer is trainer and data.calls == ["prepare_data", "setup fit", "teardown fit"]
    assert data.stages == {("CSVLogger", False), ("CSVLogger", True), ("DummyLogger", True)}
    assert module.calls == ["fit"] and module.trainer is trainer and len(factorized_in(module)) == 4


def failing(when):
    """Return what validates until a call, and then raises."""

    def judge(module, scores):
        SEEN.append(module)
        if len(SEEN) == when:
            raise RuntimeError("no more")
        module.log("acc", 0.5)

    return judge


class Keeping(Callback):
    """Keeps the state of a run just before a compression, and where it failed."""

    def __init__(self):
        self.states, self.errors = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.states.append(copy.deepcopy(state_of(trainer, pl_module)))

    def on_exception(self, trainer, pl_module, exception):
        self.states.append(state_of(trainer, pl_module))
        self.errors.append(type(exception))


@pytest.mark.situation(
    "Goals", "a drop of accuracy, and a validation that raises in a try: nothing was changed", "works"
)
@pytest.mark.parametrize("when", [5, 9])
def test_a_validation_that_raises_leaves_all_as_it_was(fit, module_class, same, when):
    SEEN.clear()
    module, keeping = module_class(failing(when)), Keeping()
    text = r"in a Trainer that has no optimizers, .* failed \(RuntimeError: no more\)\. Let .* Nothing was changed"
    with pytest.raises(MisconfigurationException, match=text):
        fit(module, keeping, lrc.LowRankCompression(max_accuracy_drop=0.1), EarlyStopping("acc", mode="max"))
    before, after = keeping.states
    assert SEEN[-1] is not module
    assert [name for name in before if not same(before[name], after[name])] == []


@pytest.mark.situation("Goals", "a drop of accuracy, and Ctrl-C in a try", "works")
def test_an_interrupt_ends_the_run_in_a_try_and_leaves_all_as_it_was(fit, module_class, same):
    SEEN.clear()

    def judge(module, scores):
        SEEN.append(module)
        if len(SEEN) == 9:
            signal.raise_signal(signal.SIGINT)
        module.log("acc", 0.5)

    module, keeping, handler = module_class(judge), Keeping(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(module, keeping, lrc.LowRankCompression(max_accuracy_drop=0.1))
    finally:
        left = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, handler)
    assert len(SEEN) == 9 and left is handler
    before, after = keeping.states
    before.pop("signals"), after.pop("signals")  # Lightning ignores Ctrl-C while it ends a run
    assert keeping.errors == [KeyboardInterrupt]
    assert [name for name in before if not same(before[name], after[name])] == []


def log(*names, value=0.5):
    return lambda module, scores: [module.log(name, value, on_step=name == "accurate") for name in names]


@pytest.mark.parametrize(
    ("judge", "monitor", "text"),
    [
        (
            log("val_f1"),
            None,
            "must log one metric with 'acc' in its name, found nothing; the validation logged val_f1",
        ),
        (
            log("acc", "top_acc"),
            None,
            "found acc, top_acc; the validation logged acc, top_acc. Name the metric by `mon",
        ),
        (log("acc"), "f1", "`monitor`='f1' must be a finite metric .* it is not logged; the validation logged acc"),
        (log("acc", value=float("nan")), None, "`monitor`='acc' must be a finite metric .* it is nan; .* logged acc"),
        (log(), "f1", "it is not logged; the validation logged nothing. Nothing was changed"),
    ],
)
def test_a_metric_that_is_none_is_an_error_before_anything_is_changed(fit, module_class, same, judge, monitor, text):
    module, keeping = module_class(judge), Keeping()
    with pytest.raises(MisconfigurationException, match=text):
        fit(module, keeping, lrc.LowRankCompression(max_accuracy_drop=0.1, monitor=monitor))
    before, after = keeping.states
    assert [name for name in before if not same(before[name], after[name])] == []


def test_a_metric_that_is_logged_by_step_too_is_one(fit, module_class):
    callback = lrc.LowRankCompression(max_accuracy_drop=0.1)
    module = module_class(lambda module, scores: module.log("acc", 0.5, on_step=True, on_epoch=True))
    fit(module, callback)
    assert callback.allocation.keep_ratio < 0.1


@pytest.mark.situation("Goals", "a drop of accuracy without a validation", "refused")
@pytest.mark.parametrize("lacking", ["loader", "step", "batches"])
@pytest.mark.filterwarnings("ignore:You (defined|passed) ")
def test_a_run_without_a_validation_is_refused_before_it_begins(module_class, loader, new_trainer, tmp_path, lacking):
    module = module_class()
    if lacking == "step":
        module.validation_step = LightningModule.validation_step.__get__(module)
    trainer = new_trainer(
        tmp_path, lrc.LowRankCompression(max_accuracy_drop=0.1), limit_val_batches=0 if lacking == "batches" else 2
    )
    loaders = [loader()] if lacking == "loader" else [loader(), loader()]
    text = rf"this run has none: .* be above 0 \(it is {trainer.limit_val_batches}\)\. Add what is missing, or ask for"
    with pytest.raises(MisconfigurationException, match=text):
        trainer.fit(module, *loaders)
    assert trainer.global_step == 0


@pytest.mark.situation("Goals", "a drop of accuracy on several processes", "refused")
def test_several_processes_are_refused_before_the_run_begins(module_class, loader, new_trainer, tmp_path):
    module, callback = lrc.prepare(module_class()), lrc.LowRankCompression(max_accuracy_drop=0.1)
    trainer = new_trainer(tmp_path, callback, strategy="ddp_spawn", devices=2)
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, train_dataloaders=loader(), val_dataloaders=loader())
    with pytest.raises(MisconfigurationException, match=r"on one process, and this run has 2\. Find the fraction in a"):
        callback.setup(trainer, module, "fit")


def test_loaders_that_are_gone_through_together_are_refused(module_class, loader, new_trainer, tmp_path):
    callback = lrc.LowRankCompression(max_accuracy_drop=0.1, epochs=0, **PLAIN)
    together = CombinedLoader([loader(), loader()], "max_size")
    with pytest.raises(
        MisconfigurationException, match=r"got CombinedLoader\(mode='max_size'\)\. Give the Trainer a list"
    ):
        new_trainer(tmp_path, callback).fit(module_class(), loader(), together)


def test_a_loader_that_can_be_gone_through_once_is_refused(module_class, loader, new_trainer, tmp_path):
    callback = lrc.LowRankCompression(max_accuracy_drop=0.1, epochs=0, **PLAIN)
    text = r"goes through the validation loader once more, and a list_iterator can be .*Or ask for a `keep_ratio`"
    with pytest.raises(MisconfigurationException, match=text):
        new_trainer(tmp_path, callback, limit_val_batches=2).fit(module_class(), loader(), iter([*loader()]))


def test_a_copy_that_runs_the_networks_own_weights_is_refused(fit, module_class):
    module = module_class()
    network = module.network
    module.forward = lambda images: network(images) * 1
    text = r"a copy ran a layer of the module itself \(network\.0\)\. It may hold .* Nothing was changed"
    with pytest.raises(MisconfigurationException, match=text):
        fit(module, lrc.LowRankCompression(max_accuracy_drop=0.1, **PLAIN))


def test_a_module_that_cannot_be_copied_is_refused(fit, module_class):
    module = module_class()
    module.kept = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(
        MisconfigurationException, match=r"`max_accuracy_drop` tries copies of the module, and it could not"
    ):
        fit(module, lrc.LowRankCompression(max_accuracy_drop=0.1, **PLAIN))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_accuracy_drop": 0}, r"`max_accuracy_drop` must be a number above 0, .* in percent\), got 0\."),
        ({"max_accuracy_drop": float("inf")}, "`max_accuracy_drop` must be a number above 0, .* got inf"),
        ({"max_accuracy_drop": [0.1]}, r"`max_accuracy_drop` must be a number above 0, .* got \[0\.1\]"),
        ({"max_accuracy_drop": 0.1, "keep_ratio": 0.5}, "got `keep_ratio` and `max_accuracy_drop`"),
        ({"max_accuracy_drop": 0.1, "max_error": 0.5}, "got `max_error` and `max_accuracy_drop`"),
        ({"max_accuracy_drop": 0.1, "ramp": True, "epochs": [1, 2]}, "`ramp` leads to one `keep_ratio` over"),
        ({"max_accuracy_drop": 0.1, "when": "auto", "epochs": [1, 2]}, "when='auto' finds the epoch"),
        ({"max_accuracy_drop": 0.1, "monitor": "val_loss"}, "of which more is better, .* or None, got 'val_loss'"),
        ({"max_accuracy_drop": 0.1, "monitor": 1}, "`monitor` must be the name of a metric .* got 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        lrc.LowRankCompression(**options)


def test_an_analysis_knows_no_accuracy():
    with pytest.raises(
        ValueError, match=r"must be asked of LowRankCompression in a Trainer, .* got \{'max_accuracy_drop'"
    ):
        lrc.analyze(nn.Sequential(nn.Linear(64, 64))).allocate({"max_accuracy_drop": 0.1})


# Lightning 2.6 calls what newer versions of jsonargparse deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_comes_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        """
seed_everything: 0
trainer: {max_epochs: 2, limit_train_batches: 3, limit_val_batches: 1, accelerator: cpu, logger: false,
  enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false}
compress: {max_accuracy_drop: 0.3, monitor: val_accuracy, epochs: 1}
model:
  class_path: lr_callback.recipes.ImageClassifier
  init_args:
    network: {class_path: lr_callback.recipes.CifarResNet, init_args: {depth: 8, in_channels: 1}}
    learning_rate: 0.05
data: {class_path: lr_callback.recipes.DigitsData, init_args: {batch_size: 64}}
""",
        encoding="utf-8",
    )
    made, finish = [], lrc.LowRankCompression.on_fit_end
    monkeypatch.setattr(
        lrc.LowRankCompression, "on_fit_end", lambda self, *given: made.append(self) or finish(self, *given)
    )
    monkeypatch.setattr("sys.argv", ["lr-callback", "fit", "--config", "run.yaml"])
    main()
    assert made[0].events == {1: {"max_accuracy_drop": 0.3}} and made[0].allocation.keep_ratio < 1
