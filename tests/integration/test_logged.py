"""Accuracies that a run's own validations log stand in its loggers as those before and after a compression."""

import signal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.host.timed import RunTimes
from lr_callback.model.find import factorized_in

BEFORE, AFTER = "compression/accuracy_before", "compression/accuracy_after"
pytestmark = pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")


class Graded(LightningModule):
    """Its validation logs the epoch's number as the accuracy: what is logged when can be seen."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        if "train_acc" in self.names:
            self.log("train_acc", loss.detach(), on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        for name in self.names:
            if name != "train_acc":
                self.log(name, self.current_epoch / 10)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def logged(tmp_path, names, limit=1.0, ratio=0.6, epochs=2, **callback):
    """Run four epochs, by default with a compression at the start of the third; return name -> (step, latest value)."""
    told = {}

    class Noting(CSVLogger):
        def log_metrics(self, metrics, step=None):
            told.update({name: (step, value) for name, value in metrics.items() if name in (BEFORE, AFTER)})
            super().log_metrics(metrics, step)

    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(4, (32,))), batch_size=8)
    compression = lrc.LowRankCompression(ratio, epochs, method=lrc.ALDS(), refit=None, show_table=False, **callback)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=Noting(tmp_path),
        callbacks=[compression],
        limit_val_batches=limit,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Graded(names), loader, loader)
    return told


@pytest.mark.parametrize(
    ("names", "monitor"),
    [(["val_acc"], None), (["val_acc", "train_acc"], None), (["acc"], None), (["val_acc", "val_acc_top5"], "val_acc")],
)
def test_they_are_of_the_validations_on_both_sides(tmp_path, names, monitor):
    # Four steps an epoch: the compression is at step 8, the validation after it at the end of epoch 2.
    assert logged(tmp_path, names, monitor=monitor) == {
        BEFORE: (8, pytest.approx(0.1)),
        AFTER: (11, pytest.approx(0.2)),
    }


def test_a_second_compression_has_its_own(tmp_path):
    told = logged(tmp_path, ["val_acc"], ratio=[0.8, 0.6], epochs=[1, 3])
    assert told == {BEFORE: (12, pytest.approx(0.2)), AFTER: (15, pytest.approx(0.3))}


@pytest.mark.parametrize("names", [["val_loss"], ["val_acc", "val_acc_top5"]], ids=["none", "two"])
def test_none_is_logged_where_it_cannot_be_told(tmp_path, names):
    assert logged(tmp_path, names) == {}


def test_none_is_logged_without_a_validation(tmp_path):
    assert logged(tmp_path, ["val_acc"], limit=0) == {}


TIMES = ["compression/milliseconds_before", "compression/milliseconds_after"]


class Shown(Graded):
    """One that says what it takes, and draws random numbers."""

    def __init__(self, example, mistake=False):
        super().__init__(["val_acc"])
        self.network.insert(1, nn.Dropout())
        self.example_input_array, self.mistake = example, mistake
        self.runs, self.interrupted_at = 0, None

    def forward(self, rows):
        self.runs += 1
        if self.runs == self.interrupted_at:
            signal.raise_signal(signal.SIGINT)
        if self.mistake and isinstance(self.network[0], lrc.layers.FactorizedLinear):
            raise RuntimeError("not when it is cut")
        return self.network(rows)


def times(tmp_path, module, ratio=0.6, epochs=2, **options):
    """Run four epochs; return name -> {step: value} of all times that were logged, and the Trainer."""
    logger = CSVLogger(tmp_path, name="times")
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(4, (32,))), batch_size=8)
    callback = lrc.LowRankCompression(ratio, epochs, **({"method": lrc.ALDS(), "refit": None} | options))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=logger, callbacks=[callback], log_every_n_steps=1, **quiet
    )
    trainer.fit(module, loader, loader)
    return logger.log_dir, trainer


WITH_CALIBRATION = {"method": lrc.ALDS("activation")}
BAD_EXAMPLE = "ignore:.*how many multiply-adds can be kept is not said"


@pytest.mark.filterwarnings(BAD_EXAMPLE)
@pytest.mark.parametrize(
    ("example", "options", "what"),
    [
        (torch.zeros(4, 16), {}, "the `example_input_array`"),
        (torch.zeros(4, 16), WITH_CALIBRATION, "the `example_input_array`"),
        (None, WITH_CALIBRATION, "a calibration batch"),
        (torch.zeros(4, 5), WITH_CALIBRATION, "a calibration batch"),
    ],
    ids=["example", "example and batches", "batches", "an example of another size and batches"],
)
def test_times_are_of_runs_on_both_sides(tmp_path, read_metrics, messages, example, options, what):
    folder, trainer = times(tmp_path, Shown(example), [0.8, 0.6], [1, 3], **options)
    logged = read_metrics(folder)
    assert [sorted(logged[name]) for name in TIMES] == [[4, 12]] * 2
    assert all(0 < value < 1000 for name in TIMES for value in logged[name].values())
    assert all(trainer.callback_metrics[name] == pytest.approx(logged[name][12]) for name in TIMES)
    said = [text.splitlines()[-1] for text in messages if text.startswith("Low-rank compression at the start")]
    assert len(said) == 2
    for line, step in zip(said, (4, 12), strict=True):
        before, after = (f"{logged[name][step]:.2f} ms" for name in TIMES)
        assert line == f"A run on {what} takes {after}, and took {before} before."


def test_with_neither_an_example_nor_batches_no_times_are_logged(tmp_path, read_metrics, messages):
    folder, _ = times(tmp_path, Shown(None))
    assert not {*TIMES} & {*read_metrics(folder)}
    assert not any("A run on" in text for text in messages)


@pytest.mark.parametrize("show_table", [True, False])
@pytest.mark.filterwarnings(BAD_EXAMPLE)
def test_an_example_that_it_cannot_be_run_on_is_said(tmp_path, read_metrics, messages, show_table):
    text = (
        r"^LowRankCompression: what a run takes is not logged: the network must run on the `example_input_array`, and "
        r"it raised RuntimeError: mat1 and mat2 .*\. The compression is not affected\. Let it run on that in eval "
        r"mode\.$"
    )
    with pytest.warns(UserWarning, match=text):
        folder, _ = times(tmp_path, Shown(torch.zeros(4, 5)), show_table=show_table)
    assert not {*TIMES} & {*read_metrics(folder)}
    assert not any("A run on" in one for one in messages)


@pytest.mark.parametrize(("example", "options"), [(torch.zeros(4, 16), {}), (None, WITH_CALIBRATION)])
def test_runs_that_are_timed_change_nothing_of_a_training(tmp_path, monkeypatch, example, options):
    found = []
    for timed in (True, False):
        if not timed:
            monkeypatch.setattr(RunTimes, "_measure", lambda self, interruptible: (None, ""))
        torch.manual_seed(1)
        found.append(Shown(example))
        _, trainer = times(tmp_path, found[-1], **options)
        assert (TIMES[0] in trainer.callback_metrics) == timed
    for one, two in zip(*(module.state_dict().values() for module in found), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("run", "runs", "is_cut"), [(1, 1, False), (7, 12, True)], ids=["before", "after"])
def test_an_interrupt_while_runs_are_timed_ends_them_before_the_cut_and_waits_after_it(tmp_path, run, runs, is_cut):
    module = Shown(torch.zeros(4, 16))
    module.interrupted_at, handler = run, signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            times(tmp_path, module, show_table=False)
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert module.runs == runs
    assert bool(factorized_in(module)) == is_cut


def test_a_network_that_cannot_be_run_after_a_compression_is_compressed_all_the_same(tmp_path, read_metrics):
    text = r"what a run takes is not logged: .*, and now it raised RuntimeError: not when it is cut\. The training goes"
    with pytest.warns(UserWarning, match=text):
        folder, _ = times(tmp_path, Shown(torch.zeros(4, 16), mistake=True))
    logged = read_metrics(folder)
    assert logged["compression/kept_parameters"][8] < 0.61 and not {*TIMES} & {*logged}
