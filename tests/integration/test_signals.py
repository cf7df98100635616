"""A signal that comes during a compression is handled when there is a whole one, or none."""

import os
import signal

import pytest
import torch

from lr_callback import LowRankCompression
from lr_callback.host import cut

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGUSR1"),
]


@pytest.fixture
def signalled(monkeypatch):
    """Return a function that lets a signal come in the middle of the surgery."""
    replace = cut.replace_layers

    def choose(signum):
        def disturbed(*arguments, **options):
            report = replace(*arguments, **options)
            os.kill(os.getpid(), signum)
            return report

        monkeypatch.setattr(cut, "replace_layers", disturbed)

    return choose


@pytest.mark.situation("Checkpoints", "a signal's handler that saves, in the middle of a compression", "works")
def test_checkpoint_that_a_signal_asks_for_holds_no_half_compression(
    tmp_path, new_module, new_trainer, loader, signalled, same
):
    path = tmp_path / "asked.ckpt"
    trainer = new_trainer(tmp_path, LowRankCompression(0.5, 1, show_table=False))
    former = signal.signal(signal.SIGUSR1, lambda signum, frame: trainer.save_checkpoint(path))
    try:
        signalled(signal.SIGUSR1)
        trainer.fit(new_module(), loader(), loader())
    finally:
        signal.signal(signal.SIGUSR1, former)
    written = torch.load(path, weights_only=True)
    assert written["callbacks"]["LowRankCompression"]["applied"] == [1]
    assert any(name.endswith("encoder.weight") for name in written["state_dict"])
    assert len(written["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(trainer.model.parameters()))

    signalled(0)
    again = new_trainer(tmp_path, LowRankCompression(0.5, 1, show_table=False))
    again.fit(new_module(), loader(), loader(), ckpt_path=path)
    assert same(dict(again.lightning_module.state_dict()), dict(trainer.lightning_module.state_dict()))


@pytest.mark.situation("All or nothing", "Ctrl-C in the middle of a compression", "works")
def test_interrupt_leaves_a_whole_compression(fit, new_module, signalled):
    callback, module = LowRankCompression(0.5, 1, show_table=False), new_module()
    signalled(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(module, callback)
    assert callback.state_dict()["applied"] == [1]
    assert sum(one.numel() for one in module.parameters()) == callback.allocation.cost
