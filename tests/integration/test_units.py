"""Units in a run that are no parameters: one of the user's own, and what is kept for the backward pass."""

import sys

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import lr_callback as lrc
from lr_callback.cli import main
from lr_callback.model.observe import observe


@pytest.fixture
def run(new_module, loader, tmp_path):
    """Return what trains a small network on digits with a callback, three epochs long."""

    def train(callback, ckpt_path=None, rows=64, **options):
        module = new_module()
        module.example_input_array = torch.zeros(rows, 1, 8, 8) if rows else None
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(callbacks=[callback], default_root_dir=tmp_path, **{"max_epochs": 3, **silent, **options})
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer, module

    return train


def lines(module):
    """Return the lines of 64 bytes that hold the parameters."""
    return sum(-(-parameter.numel() // 16) for parameter in module.parameters())


@pytest.mark.situation("Goals", "a budget in activation memory", "works")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_budget_in_activation_memory_is_kept_and_a_resumed_run_knows_it(run, epochs):
    def callback():
        budget = {"parameters": 0.5, "activation_memory": 1.3}
        return lrc.LowRankCompression(epochs=epochs, budget=budget, method=lrc.ALDS(), refit=None)

    first = callback()
    trainer, module = run(first)
    spent = first.allocation.others["activation_memory"]
    assert spent.dense_cost < spent.cost <= spent.budget
    if not epochs:
        counted = observe(module, module.example_input_array, activations=True).activations
        assert counted.dense == spent.dense_cost
    again = callback()
    run(again, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert again.allocation == first.allocation
    assert again._counting.observation == first._counting.observation


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_an_example_is_run_in_the_precision_of_the_steps(run, precision):
    def observed(rows):
        budget = {"parameters": 0.5, "activation_memory": 1.5}
        callback = lrc.LowRankCompression(epochs=1, budget=budget, method=lrc.ALDS(), refit=None)
        run(callback, rows=rows, precision=precision)
        return callback._counting.observation

    of_example, of_batch = observed(64), observed(None)
    assert of_example == of_batch, "the first batch has 64 rows"
    casts = {call.autocast for calls in of_example.activations.calls.values() for call in calls}
    assert casts == {torch.bfloat16 if precision == "bf16-mixed" else None}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_batch_that_is_looked_at_beforehand_changes_nothing_of_a_training(run, same, epochs):
    """With an example of the batches' shape there is none; all else is alike."""

    def trained(rows):
        torch.manual_seed(3)
        callback = lrc.LowRankCompression(0.5, cost="multiply_adds", epochs=epochs, method=lrc.ALDS(), refit=None)
        trainer, module = run(callback, rows=rows)
        return callback.allocation, dict(module.state_dict()), trainer.optimizers[0].state_dict(), torch.rand(1)

    allocation, *others = trained(64)
    of_batch, *of_others = trained(None)
    assert allocation == of_batch
    assert same(others, of_others)


@pytest.mark.situation("Goals", "a cost of one's own", "works")
def test_a_cost_of_ones_own_is_kept_in_a_run(run):
    callback = lrc.LowRankCompression(0.5, cost=lines, epochs=1, method=lrc.ALDS(slices=[1, 2]), refit=None)
    _, module = run(callback)
    assert callback.allocation.unit.endswith("test_units.lines")
    assert lines(module) == callback.allocation.cost <= callback.allocation.budget


@pytest.mark.situation("Goals", "a cost of one's own that does not add up", "refused")
def test_a_cost_that_does_not_add_up_is_refused_before_the_first_step(run):
    steps = []

    class Counted(lrc.LowRankCompression):
        def on_train_batch_start(self, *_):
            steps.append(1)

    callback = Counted(0.5, cost=lambda module: lines(module) ** 2, epochs=1, method=lrc.ALDS(), refit=None)
    with pytest.raises(ValueError, match="layers must cost together what each of them does"):
        run(callback)
    assert not steps


CONFIG = """
seed_everything: 0
trainer: {max_epochs: 2, log_every_n_steps: 1, limit_train_batches: 2, limit_val_batches: 1,
  accelerator: cpu, logger: LOGGER, enable_checkpointing: false, enable_progress_bar: false,
  enable_model_summary: false}
compress:
  keep_ratio: 0.5
  cost: COST
  epochs: 1
  method: {class_path: lr_callback.ALDS, init_args: {slices: [1]}}
  refit: null
model:
  class_path: lr_callback.recipes.ImageClassifier
  init_args:
    network: {class_path: lr_callback.recipes.CifarResNet, init_args: {depth: 8, in_channels: 1}}
    learning_rate: 0.05
data: {class_path: lr_callback.recipes.DigitsData, init_args: {batch_size: 64}}
"""


# Lightning 2.6 calls what newer versions of jsonargparse deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("cost", "unit"), [("bytes", "bytes"), ("of_mine.energy", "of_mine.energy")])
def test_a_cost_comes_from_yaml(cost, unit, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "of_mine", raising=False)
    text = "def energy(module):\n    return sum(one.numel() for one in module.parameters())\n"
    (tmp_path / "of_mine.py").write_text(text, encoding="utf-8")
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}"
    (tmp_path / "run.yaml").write_text(CONFIG.replace("COST", cost).replace("LOGGER", logger), encoding="utf-8")
    made = []
    finish = lrc.LowRankCompression.on_fit_end
    monkeypatch.setattr(
        lrc.LowRankCompression, "on_fit_end", lambda self, *given: made.append(self.allocation) or finish(self, *given)
    )
    monkeypatch.setattr("sys.argv", ["lr-callback", "fit", "--config", "run.yaml"])
    main()
    assert made[0].unit == unit
    (written,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(written.read_text(encoding="utf-8"))["compress"]["cost"] == cost
