"""What compares a metric with its best so far begins anew at a compression, and every file is of one model."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lr_callback import LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
CUT = 2


class Jump(Callback):
    """Log a loss that falls, jumps at the cut, and falls again without coming back to what it was."""

    values = (1.0, 0.5, 3.0, 2.0, 1.9, 1.8)  # by epoch

    def __init__(self, sign=1):
        self.sign = sign

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("jump", self.sign * self.values[trainer.current_epoch])


def compression(epochs=CUT, **settings):
    return LowRankCompression([0.6, 0.3][: len([epochs] if isinstance(epochs, int) else epochs)], epochs,
                              show_table=False, **settings)  # fmt: skip


@pytest.fixture
def run(fit, new_module, tmp_path):
    """Return a function that trains for six epochs with the jumping metric."""

    def run(*callbacks, module=None, sign=1, **settings):
        settings = {"max_epochs": 6, "enable_checkpointing": True, **settings}
        return fit(module or new_module(), Jump(sign), *callbacks, **settings)

    return run


def is_compressed(path):
    return any("encoder" in name for name in torch.load(path, weights_only=True)["state_dict"])


def epoch_in(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.mark.situation("Other callbacks", "ModelCheckpoint with a monitor and save_last", "works")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_and_last_files_hold_the_compressed_model(run, tmp_path, mode):
    best = ModelCheckpoint(tmp_path / "files", "{epoch}", monitor="jump", mode=mode, save_last=True)
    run(compression(), best, sign=1 if mode == "min" else -1)
    assert is_compressed(best.best_model_path)
    assert (epoch_in(best.best_model_path), epoch_in(best.last_model_path)) == (5, 5)
    assert is_compressed(best.last_model_path)
    assert float(best.best_model_score) == pytest.approx(1.8 if mode == "min" else -1.8)


def test_without_beginning_anew_no_file_holds_the_compressed_model(run, tmp_path):
    # What the default prevents: Lightning writes `last.ckpt` only along with a new best.
    best = ModelCheckpoint(tmp_path / "files", "{epoch}", monitor="jump", save_last=True)
    run(compression(reset_monitors=False), best)
    assert not any(is_compressed(path) for path in (tmp_path / "files").iterdir())


def test_best_file_of_the_dense_model_stays_on_disk(run, tmp_path):
    best = ModelCheckpoint(tmp_path / "files", "{epoch}", monitor="jump", save_top_k=2)
    run(compression(), best)
    names = {path.name: is_compressed(path) for path in (tmp_path / "files").iterdir()}
    assert names == {"epoch=0.ckpt": False, "epoch=1.ckpt": False, "epoch=4.ckpt": True, "epoch=5.ckpt": True}
    assert {Path(path).name for path in best.best_k_models} == {"epoch=4.ckpt", "epoch=5.ckpt"}
    assert float(best.kth_value) == pytest.approx(1.9)


def test_file_of_a_fixed_name_is_not_written_over(run, tmp_path):
    best = ModelCheckpoint(tmp_path / "files", "best", monitor="jump")
    run(compression(), best)
    assert {path.name: is_compressed(path) for path in (tmp_path / "files").iterdir()} == {
        "best.ckpt": False,
        "best-v1.ckpt": True,
    }


class Mine(ModelCheckpoint):
    pass


@pytest.mark.situation("Other callbacks", "several ModelCheckpoints, subclasses, without a monitor", "works")
def test_several_checkpoints_and_subclasses_begin_anew(run, tmp_path):
    files = [
        Mine(tmp_path / "a", "{epoch}", monitor="jump"),
        ModelCheckpoint(tmp_path / "b", "{epoch}", monitor="val_loss", save_top_k=3),
        ModelCheckpoint(tmp_path / "c", "{epoch}"),
        ModelCheckpoint(tmp_path / "d", "{epoch}", save_top_k=-1, monitor="val_accuracy", mode="max"),
    ]
    run(compression(), *files)
    for one in files:
        assert is_compressed(one.best_model_path)
        assert all(is_compressed(path) for path in one.best_k_models)
    assert [epoch_in(path) for path in (tmp_path / "c").iterdir()] == [5]  # it keeps the latest, as ever
    assert len(list((tmp_path / "d").iterdir())) == 6


@pytest.mark.situation("Other callbacks", "EarlyStopping", "works")
@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_waits_for_the_compressed_model(run, mode):
    stopping = EarlyStopping("jump", patience=2, mode=mode)
    trainer = run(stopping, compression(), sign=1 if mode == "min" else -1)
    assert (trainer.global_step, stopping.stopped_epoch) == (24, 0)
    assert float(stopping.best_score) == pytest.approx(1.8 if mode == "min" else -1.8)
    kept = EarlyStopping("jump", patience=2, mode=mode)
    run(kept, compression(reset_monitors=False), sign=1 if mode == "min" else -1)
    assert kept.stopped_epoch == CUT + 1


def test_early_stopping_still_stops_a_compressed_model_that_does_not_improve(run):
    stopping = EarlyStopping("jump", patience=1, min_delta=0.3)
    run(stopping, compression())
    assert (stopping.stopped_epoch, stopping.wait_count) == (4, 1)


def plateau(module):
    optimizer = SGD(module.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, patience=2, factor=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "jump"}}


@pytest.mark.parametrize("anew", [True, False])
def test_plateau_goes_on_as_it_would_have(run, new_module, anew):
    trainer = run(compression(reset_monitors=anew), module=new_module(plateau))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    assert float(trainer.lr_scheduler_configs[0].scheduler.best) == 0.5


def told(messages):
    return [text for text in messages if "begin anew" in text]


def test_user_is_told_once_at_each_compression_who_begins_anew(run, new_module, tmp_path, messages):
    files = [ModelCheckpoint(tmp_path / name, monitor=name) for name in ("jump", "val_loss")]
    stopping = EarlyStopping("jump", patience=5)
    run(compression([1, 3]), stopping, *files, module=new_module(plateau))
    texts = told(messages)
    assert len(texts) == 2
    assert texts[0].startswith("LowRankCompression: EarlyStopping, ModelCheckpoint begin anew")


def test_nothing_is_told_where_nothing_begins_anew(run, new_module, tmp_path, messages):
    run(compression(0), EarlyStopping("jump", patience=5), module=new_module(plateau))
    run(compression(reset_monitors=False), EarlyStopping("jump", patience=5))
    run(compression(), enable_checkpointing=False)
    assert told(messages) == []


def remembered(stopping, best, scheduler):
    names = ("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value")
    found = {name: getattr(best, name) for name in (*names, "current_score")}
    return {**found, "stop": (stopping.wait_count, stopping.best_score), "plateau": (scheduler.best,
            scheduler.num_bad_epochs, scheduler.cooldown_counter)}  # fmt: skip


def test_monitors_are_as_before_when_the_cut_fails(run, new_module, tmp_path, monkeypatch):
    stopping, best = EarlyStopping("jump", patience=5), ModelCheckpoint(tmp_path / "a", monitor="jump")
    module, seen = new_module(plateau), {}

    def fail(*_):
        seen["during"] = (best.best_model_path, dict(best.best_k_models), stopping.wait_count)
        raise MemoryError("injected")

    class Before(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen["before"] = remembered(stopping, best, trainer.lr_scheduler_configs[0].scheduler)
            seen["scheduler"] = trainer.lr_scheduler_configs[0].scheduler

    monkeypatch.setattr("lr_callback.host.cut.retire", fail)
    with pytest.raises(MemoryError, match="injected"):
        run(stopping, Before(), compression(), best, module=module)
    assert seen["during"] == ("", {}, 0)
    assert seen["before"]["best_model_path"] != ""
    assert remembered(stopping, best, seen["scheduler"]) == seen["before"]


@pytest.mark.situation("Other callbacks", "EarlyStopping and ModelCheckpoint, resumed after the cut", "works")
def test_resumed_monitors_are_those_of_the_uninterrupted_run(run, new_module, tmp_path, loader, new_trainer):
    def callbacks():
        best = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="jump", save_top_k=2)
        return [EarlyStopping("jump", patience=3), compression(), best]

    every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1)
    whole = callbacks()
    run(*whole, every)
    again = callbacks()
    trainer = new_trainer(tmp_path, Jump(), *again, max_epochs=6, enable_checkpointing=True)
    trainer.fit(new_module(), loader(), loader(), ckpt_path=tmp_path / "every" / "epoch=3.ckpt")
    assert again[0].state_dict() == whole[0].state_dict()
    scores = [{key.split("=")[1][0]: float(value) for key, value in one[2].best_k_models.items()}
              for one in (again, whole)]  # fmt: skip
    assert scores[0] == scores[1]


class Written(Callback):
    """Note whether the model has factorized layers whenever a metric is made, and when a file is written."""

    def __init__(self):
        self.metric, self.file = {}, {}

    def on_validation_end(self, trainer, pl_module):
        self.metric[trainer.current_epoch] = has_factors(pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.file[trainer.current_epoch] = any("encoder" in name for name in checkpoint["state_dict"])


def has_factors(module):
    return any("encoder" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("first", [True, False])
def test_metric_and_weights_of_a_file_are_of_one_model(run, tmp_path, first):
    # A cut at the end of an epoch would store the compressed weights under the metric of the dense ones.
    written = Written()
    files = ModelCheckpoint(tmp_path / "files", "{epoch}", monitor="jump", save_top_k=-1)
    run(*([compression([1, 3]), written, files] if first else [files, written, compression([1, 3])]))
    assert written.metric == written.file == {epoch: epoch >= 1 for epoch in range(6)}


@pytest.mark.parametrize(
    "when", [{}, {"val_check_interval": 2}, {"num_sanity_val_steps": 1}, {"val_check_interval": 1}]
)
def test_new_layers_are_trained_and_validated_in_the_right_mode(run, when):
    # Layers put in place while validation runs would stay in eval mode: Lightning does not know them.
    modes = {"train": set(), "validation": set()}

    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes["train"] |= {module.training for module in pl_module.modules()}

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            modes["validation"] |= {module.training for module in pl_module.modules()}

    trainer = run(compression([1, 3]), Modes(), enable_checkpointing=False, **when)
    assert has_factors(trainer.lightning_module)
    assert modes == {"train": {True}, "validation": {False}}


def test_run_that_was_not_validated_after_the_cut_is_warned_that_there_is_no_best_file(run, tmp_path):
    best = ModelCheckpoint(tmp_path / "files", "{epoch}", monitor="jump")
    match = rf"ModelCheckpoint\(monitor='jump'\) has seen no metric since.* are in {tmp_path / 'files'}\."
    with pytest.warns(UserWarning, match=match):
        run(compression(4), best, check_val_every_n_epoch=4)
    assert best.best_model_path == ""
    assert [is_compressed(path) for path in (tmp_path / "files").iterdir()] == [False]


@pytest.mark.parametrize("kept", [{"monitor": None}, {"monitor": "jump", "save_top_k": 0}], ids=str)
def test_checkpoint_that_keeps_no_best_is_not_warned_of(run, tmp_path, kept):
    run(compression(4), ModelCheckpoint(tmp_path / "files", **kept), check_val_every_n_epoch=4)
