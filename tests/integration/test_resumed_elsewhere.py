"""Runs that go on with a file, a model or arguments that are not those of the run before."""

import shutil

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lr_callback import FactorizedLinear, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*epochs .* are never reached"),
]
LAYERS = ["network.8", "network.10"]


def compression(ratios=0.5, epochs=1, **settings):
    return LowRankCompression(ratios, epochs, include=LAYERS, show_table=False, **settings)


def factorized(trainer):
    return [name for name, one in trainer.lightning_module.named_modules() if isinstance(one, FactorizedLinear)]


@pytest.fixture
def train(new_trainer, loader, tmp_path):
    def run(module, *callbacks, ckpt_path=None, root=tmp_path, **settings):
        settings = {"max_epochs": 3, "enable_checkpointing": True, **settings}
        trainer = new_trainer(root, *callbacks, **settings)
        torch.manual_seed(0)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer

    return run


def every_step(root):
    return ModelCheckpoint(root, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)


@pytest.mark.parametrize("step", [11, 12])
@pytest.mark.situation("Checkpoints", "resume from the last steps of a run with an average of the weights", "works")
def test_file_of_a_runs_last_step_still_ends_with_the_average(train, new_module, tmp_path, step):
    whole = train(new_module(), EMAWeightAveraging(decay=0.5), compression(), every_step(tmp_path))
    ended = train(new_module(), EMAWeightAveraging(decay=0.5), compression(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert factorized(ended) == LAYERS[:1]
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, ended.lightning_module.state_dict()[name]), name


@pytest.mark.situation("Checkpoints", "a file that lacks the compressed layers", "refused")
def test_file_without_the_compressed_layers_is_refused(train, new_module, tmp_path):
    class Partial(new_module):
        strict_loading = False

        def state_dict(self, *arguments, **options):
            whole = super().state_dict(*arguments, **options)
            return {name: value for name, value in whole.items() if not name.startswith("network.8")}

    train(Partial(), compression(), every_step(tmp_path))
    text = r"step=6.ckpt is of a compressed run, and must hold all layers that were compressed; it lacks network\.8"
    with pytest.raises(MisconfigurationException, match=text):
        train(Partial(), compression(), ckpt_path=tmp_path / "step=6.ckpt")


def test_another_model_in_the_same_trainer_is_compressed_too(train, new_module, loader):
    callback = compression()
    trainer = train(new_module(), callback)
    assert factorized(trainer) == LAYERS[:1]
    trainer.fit_loop.max_epochs = 5
    trainer.fit(new_module(), loader(), loader())
    assert factorized(trainer) == LAYERS[:1] and callback.state_dict()["applied"] == [1]


def test_dense_weights_between_two_fits_are_compressed_again(train, new_module, loader):
    module = new_module()
    dense = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = train(module, compression())
    module.load_state_dict(dense)
    assert factorized(trainer) == []
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader(), loader())
    assert factorized(trainer) == LAYERS[:1]


def test_dense_snapshot_is_never_written_of_a_compressed_model(train, new_module, tmp_path):
    def callback():
        return compression([0.7, 0.4], [1, 2], snapshots=True)

    train(new_module(), callback(), every_step(tmp_path / "files"))
    shutil.rmtree(tmp_path / "lightning_logs", ignore_errors=True)
    for path in tmp_path.rglob("*.ckpt"):
        if path.parent.name == "compression":
            path.unlink()
    resumed = callback()
    train(new_module(), resumed, ckpt_path=tmp_path / "files" / "step=6.ckpt", root=tmp_path / "other")
    assert sorted(resumed.snapshot_files) == ["cut", "final"]


def test_budgets_of_events_that_have_passed_are_not_checked_again(train, new_module, tmp_path):
    train(new_module(), compression(0.5, 1), every_step(tmp_path))
    # With network.8 left dense nothing near 0.3 can be reached, but that event is over.
    late = LowRankCompression([0.3, 0.98], [1, 2], include=["network.10"], show_table=False)
    ended = train(new_module(), late, ckpt_path=tmp_path / "step=6.ckpt")
    assert late.state_dict()["applied"] == [1, 2]
    assert late.allocation.keep_ratio == 0.98 and ended.current_epoch == 3
