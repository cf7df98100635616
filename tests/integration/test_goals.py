"""Goals in a run: budgets in several units, an error, and layers that are overridden."""

import pytest
import torch
from lightning.pytorch import Trainer

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze
from lr_callback.cli import main
from lr_callback.model.observe import observe
from lr_callback.model.pricing import Prices


@pytest.fixture
def run(new_module, loader, tmp_path):
    """Return what trains a small network on digits with a callback, two epochs long."""

    def train(callback, ckpt_path=None, **options):
        module = new_module()
        module.example_input_array = torch.zeros(64, 1, 8, 8)
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path, **silent, **options)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return trainer, module

    return train


@pytest.mark.situation("Goals", "budgets in several units at once", "works")
@pytest.mark.parametrize("epochs", [0, 1])
def test_budgets_in_several_units_are_all_kept(run, epochs):
    callback = lrc.LowRankCompression(
        epochs=epochs, budget={"parameters": 0.5, "multiply_adds": 0.6, "bytes": 0.55}, method=lrc.ALDS(), refit=None
    )
    _, module = run(callback, enable_checkpointing=False)
    found = callback.allocation
    assert found.cost == sum(parameter.numel() for parameter in module.parameters()) <= 0.5 * found.dense_cost
    assert set(found.others) == {"multiply_adds", "bytes"}
    counted = observe(module.network, torch.zeros(64, 1, 8, 8))
    assert found.others["multiply_adds"].cost == counted.multiply_adds(module.network)
    assert all(one.cost <= one.budget for one in found.others.values())


@pytest.mark.situation("Goals", "the smallest model within an error", "works")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_error_is_met_and_a_resumed_run_knows_what_was_asked(run, tmp_path):
    callback = lrc.LowRankCompression(max_error=0.4, epochs=1, method=lrc.ALDS(), refit=None)
    trainer, _ = run(callback)
    assert 0 < callback.allocation.worst_error <= 0.4 and callback.allocation.max_error == 0.4
    again = lrc.LowRankCompression(max_error=0.4, epochs=1, method=lrc.ALDS(), refit=None)
    run(again, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert again.allocation == callback.allocation


@pytest.mark.situation("Goals", "layers overridden", "works")
def test_overridden_layers_are_as_asked_in_a_run(run):
    pins = {"place:first": "dense", "network.8": {"rank": 4}, "*.10": {"keep_ratio": 0.5}}
    callback = lrc.LowRankCompression(0.5, epochs=1, overrides=pins)
    _, module = run(callback, enable_checkpointing=False)
    layers = callback.allocation.layers
    assert "network.0" not in layers and isinstance(module.network[0], torch.nn.Conv2d)
    assert (layers["network.8"].rank, layers["network.8"].num_slices) == (4, 1)
    assert layers["network.10"].cost <= 0.5 * layers["network.10"].dense_cost
    assert module.network[8].rank == 4
    assert sum(parameter.numel() for parameter in module.parameters()) == callback.allocation.cost


@pytest.mark.situation("Goals", "budgets that contradict each other", "refused")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": {"parameters": 0.9, "multiply_adds": 0.001}}, r"0\.9 of parameters, 0\.001 of multiply-adds: "),
        ({"overrides": {"network.8": {"rank": 31}}}, r"network\.8 with 1 slice\(s\) of rank 31 costs no less"),
        ({"overrides": {"encoder.*": "dense"}}, r"`overrides`: each pattern must match a layer's name, 'encoder\.\*'"),
        ({"overrides": {"type:LSTM": "dense"}}, r"`overrides`: each pattern must match a layer's type, 'type:LSTM'"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_first_step(run, options, text):
    steps = []

    class Counted(lrc.LowRankCompression):
        def on_train_batch_start(self, *_):
            steps.append(1)

    with pytest.raises(ValueError, match=text):
        run(Counted(epochs=0, method=lrc.ALDS(), refit=None, **options), enable_checkpointing=False)
    assert not steps


def test_what_can_be_kept_at_least_is_said_before_the_training(run, capsys, caplog, new_module):
    options = {"epochs": 1, "method": lrc.ALDS(), "refit": None}
    with caplog.at_level("INFO"):
        run(lrc.LowRankCompression(0.5, **options), enable_checkpointing=False)
    shown = " ".join(caplog.text.split())
    first, table = shown.index("Low-rank compression can go down to "), shown.index("at the start of epoch 1")
    assert first < table
    module = new_module()
    low = analyze(module, prices=Prices()).reachable[0]
    total = sum(parameter.numel() for parameter in module.parameters())
    assert f"go down to {100 * low:.1f} % of {total:,} parameters, " in shown and " bytes" in shown
    with pytest.raises(ValueError, match="the budget must be at least"):
        lrc.allocate(module, low * 0.99)
    caplog.clear()
    with caplog.at_level("INFO"):
        run(lrc.LowRankCompression(0.5, show_table=False, **options), enable_checkpointing=False)
    assert "go down to" not in caplog.text


# Lightning 2.6 calls what newer versions of jsonargparse deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_goals_and_overrides_come_from_yaml(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        """
seed_everything: 0
trainer:
  max_epochs: 2
  limit_train_batches: 3
  limit_val_batches: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
compress:
  budget: {parameters: 0.5, bytes: 0.6}
  epochs: 1
  method: {class_path: lr_callback.ALDS, init_args: {slices: [1, 2, 4]}}
  refit: null
  exclude: ["place:first"]
  overrides:
    "network.layer3.*": {keep_ratio: 0.5}
    "network.linear": dense
    "network.layer2.0.conv1": {rank: 4, num_slices: 2}
model:
  class_path: lr_callback.recipes.ImageClassifier
  init_args:
    network: {class_path: lr_callback.recipes.CifarResNet, init_args: {depth: 8, in_channels: 1}}
    learning_rate: 0.05
data: {class_path: lr_callback.recipes.DigitsData, init_args: {batch_size: 64}}
""",
        encoding="utf-8",
    )
    made = []
    finish = lrc.LowRankCompression.on_fit_end
    monkeypatch.setattr(
        lrc.LowRankCompression, "on_fit_end", lambda self, *given: made.append(self.allocation) or finish(self, *given)
    )
    monkeypatch.setattr("sys.argv", ["lr-callback", "fit", "--config", "run.yaml"])
    main()
    (allocation,) = made
    assert allocation.layers["network.layer2.0.conv1"].rank == 4
    assert {"network.conv1", "network.linear"} <= set(allocation.skipped)
    assert all(one.cost <= 0.5 * one.dense_cost for name, one in allocation.factorized.items() if ".layer3." in name)
    assert {one.num_slices for one in allocation.factorized.values()} <= {1, 2, 4}
    assert allocation.others["bytes"].cost <= allocation.others["bytes"].budget


@pytest.mark.parametrize("show_table", [True, False])
def test_what_is_shown_decides_nothing(run, show_table):
    """A rank that gains in multiply-adds alone is priced in the units of the line as it is."""
    pins = {"network.8": {"rank": 25}}
    callback = lrc.LowRankCompression(
        0.9, epochs=1, overrides=pins, show_table=show_table, method=lrc.ALDS(), refit=None
    )
    _, module = run(callback, enable_checkpointing=False)
    assert module.network[8].rank == 25


def test_a_budget_in_parameters_is_refused_before_the_batch_that_multiply_adds_wait_for(run):
    steps = []

    class Counted(lrc.LowRankCompression):
        def on_train_batch_start(self, *given):
            steps.append(1)
            super().on_train_batch_start(*given)

    budget = {"parameters": 0.01, "multiply_adds": 0.9}
    with pytest.raises(ValueError, match="the budget must be at least"):
        run(Counted(epochs=1, budget=budget, method=lrc.ALDS(), refit=None), enable_checkpointing=False)
    assert not steps


@pytest.mark.parametrize("ratio", [{"parameters": 0.5}, [{"parameters": 0.5}, 0.3]])
def test_a_keep_ratio_is_no_budget(ratio):
    with pytest.raises(ValueError, match=r"`keep_ratio` must be a number in \(0, 1\], .* got \{'parameters': 0\.5\}"):
        lrc.LowRankCompression(ratio, epochs=[1, 2])
