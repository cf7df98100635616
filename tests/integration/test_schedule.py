"""A run that finds out itself when to compress: once its spectra have settled, at the latest at half of its epochs."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD

from lr_callback import LowRankCompression
from lr_callback.analysis.settling import has_settled, stable_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def still(module):
    """Make an optimizer that soon stops."""
    optimizer = SGD(module.parameters(), lr=0.3)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)}


class Cuts(Callback):
    """Note what stable ranks an epoch begins with, before a compression, and when one comes."""

    def __init__(self, compression):
        self.compression, self.ranks, self.epochs = compression, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.ranks.append(stable_ranks(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.compression.allocation is not None and not self.epochs:
            self.epochs.append(trainer.current_epoch)


@pytest.fixture
def train(new_trainer, new_module, loader, tmp_path):
    """Return a function that trains with ``when="auto"``, and what was noted."""

    def run(optimize=still, ckpt_path=None, callbacks=(), **settings):
        compression = LowRankCompression(0.5, when="auto", show_table=False)
        cuts = Cuts(compression)
        trainer = new_trainer(tmp_path, cuts, compression, *callbacks, **{"max_epochs": 8, **settings})
        trainer.fit(new_module(optimize), loader(), loader(), ckpt_path=ckpt_path)
        return trainer, cuts, compression

    return run


def by_rule(ranks):
    """Return the first epoch at which the ranks of each have settled."""
    return next((epoch for epoch in range(len(ranks)) if has_settled(ranks[: epoch + 1])), None)


@pytest.mark.situation("Schedule", "when='auto', spectra that settle", "works")
def test_it_is_compressed_once_in_the_first_epoch_where_the_spectra_have_settled(train, tmp_path):
    trainer, cuts, compression = train(logger=CSVLogger(tmp_path))
    (epoch,) = cuts.epochs
    assert 2 <= epoch < 4, "earlier than half of the epochs"
    assert epoch == by_rule(cuts.ranks[: epoch + 1])
    assert compression.state_dict()["applied"] == [epoch]
    assert compression.allocation.keep_ratio == 0.5
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("compression/stable_rank")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    wanted = [sum(ranks.values()) / len(ranks) for ranks in cuts.ranks[: epoch + 1]]
    assert logged == pytest.approx(wanted, rel=1e-5)
    assert "compression/stable_rank" in trainer.callback_metrics


@pytest.mark.situation("Schedule", "when='auto', spectra that do not settle before half of the epochs", "works")
def test_at_half_of_the_epochs_it_is_compressed_whatever_the_spectra(train, new_module):
    _, cuts, compression = train(lambda module: SGD(module.parameters(), lr=0.5, momentum=0.9), max_epochs=4)
    assert by_rule(cuts.ranks[:3]) is None
    assert cuts.epochs == [2] and compression.events == {2: 0.5}


@pytest.mark.situation("Schedule", "when='auto', a run that is resumed before and after the cut", "works")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_is_resumed_is_compressed_in_the_same_epoch(train, tmp_path):
    class AtStart(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "start.ckpt")

    files = [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), AtStart()]
    whole, cuts, _ = train(callbacks=files, enable_checkpointing=True)
    (epoch,) = cuts.epochs
    for name in ("epoch=0", "start", f"epoch={epoch - 1}", f"epoch={epoch}"):
        resumed, _, compression = train(ckpt_path=tmp_path / f"{name}.ckpt")
        assert compression.state_dict()["applied"] == [epoch], name
        state = resumed.lightning_module.state_dict()
        assert all(torch.equal(one, state[key]) for key, one in whole.lightning_module.state_dict().items()), name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_compressed_run_that_is_made_longer_is_not_compressed_again(train, tmp_path):
    trainer, cuts, compression = train(max_epochs=4)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    _, _, longer = train(max_epochs=16, ckpt_path=tmp_path / "short.ckpt")
    assert longer.events == {8: 0.5}
    assert longer.state_dict()["applied"] == compression.state_dict()["applied"] == cuts.epochs
    assert longer.allocation == compression.allocation


def test_a_smoke_test_compresses_at_once(train):
    _, cuts, _ = train(max_epochs=8, fast_dev_run=True)
    assert cuts.epochs == [0]


@pytest.mark.situation("Schedule", "when='auto' and no max_epochs", "refused")
def test_without_a_number_of_epochs_it_is_refused(train):
    with pytest.raises(
        MisconfigurationException, match=r"must know how many there are, got max_epochs=-1\. Set `max_ep"
    ):
        train(max_epochs=-1, max_steps=8)


@pytest.mark.parametrize(
    "options",
    [{"epochs": 3}, {"epochs": [1]}, {"keep_ratio": [0.5]}, {"keep_ratio": [0.5, 0.3]}, {"ramp": True}],
    ids=str,
)
def test_auto_takes_one_ratio_and_no_epochs(options):
    with pytest.raises(
        ValueError, match=r"when='auto' finds the epoch .* takes one `keep_ratio`, no `epochs` and no `r"
    ):
        LowRankCompression(**options, when="auto")


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="`when` must be 'epochs' or 'auto', got 'never'"):
        LowRankCompression(when="never")


class Stop(Callback):
    """End a run after its first epoch, as EarlyStopping may."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.situation("Schedule", "a run that is stopped before its compression, which is warned of", "works")
def test_a_run_that_is_stopped_before_its_compression_says_so(train, fit, new_module):
    with pytest.warns(UserWarning, match=r"ended after 1 epochs, before .* due at the latest at the start of epoch 4;"):
        train(callbacks=[Stop()])
    with pytest.warns(UserWarning, match=r"before the compression at the start of epoch 2; the model has the size"):
        fit(new_module(), LowRankCompression(0.5, [0, 2]), Stop(), max_epochs=5)
    fit(new_module(), LowRankCompression(0.5, [0]), Stop(), max_epochs=5)  # a warning is an error in these tests
    fit(new_module(), LowRankCompression(0.5, [1]), max_epochs=5, max_steps=5)  # in the middle of the epoch of the cut
