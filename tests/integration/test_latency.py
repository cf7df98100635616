"""A budget in time, in runs of a real Trainer."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.units.latency import device_facts
from lr_callback.units.latency.files import folder

pytestmark = [
    pytest.mark.usefixtures("own_cache", "any_clock"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
METHOD = lrc.ALDS(slices=[1])
TIMES = ("", "_before", "_after")
SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Wide(LightningModule):
    """Two layers that take most of the time, one of which is by far the larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Sequential(
            nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4)
        )

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader:
    random = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(256, 64, generator=random), torch.arange(256) % 4), batch_size=128)


def run(callback, tmp_path, module=None, ckpt_path=None, more=(), **options):
    trainer = Trainer(max_epochs=2, callbacks=[callback, *more], default_root_dir=tmp_path, **SILENT, **options)
    module = module or Wide()
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer, module


class Saves(Callback):
    """Write a checkpoint at the end of the first epoch."""

    def __init__(self, file):
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def compression(keep_ratio=0.8, **options):
    return lrc.LowRankCompression(keep_ratio, **{"cost": "latency", "method": METHOD, "refit": None, **options})


@pytest.mark.situation("Goals", "a budget in measured time", "works")
def test_the_slow_layer_is_made_faster_and_the_budget_holds(tmp_path):
    callback = compression()
    trainer, _ = run(callback, tmp_path)
    found = callback.allocation
    assert trainer.callback_metrics["compression/milliseconds"] == pytest.approx(found.cost / 1e6)
    assert "network.2" in found.factorized
    assert found.unit == "latency" and found.cost <= found.budget < found.dense_cost
    assert all(layer.cost < layer.dense_cost for layer in found.factorized.values())
    assert "microseconds" in found.summary()


@pytest.mark.parametrize("share", [1.0, 0.01], ids=["measured", "of other layers"])
def test_the_time_that_was_predicted_stands_beside_the_measured_one(tmp_path, messages, share):
    module = Wide()
    module.example_input_array = torch.zeros(128, 64)
    run(compression(), tmp_path, copy.deepcopy(module))
    (file,) = folder().rglob("*.json")
    written = json.loads(file.read_text("utf-8"))
    for forms in written["times"].values():
        forms.update({form: [max(1, int(share * time[0])), time[1]] for form, time in forms.items() if "/" in form})
    file.write_text(json.dumps(written), encoding="utf-8")
    messages.clear()
    callback = compression(0.6)
    trainer, _ = run(callback, tmp_path, module)
    logged = {name: f"{trainer.callback_metrics[f'compression/milliseconds{name}']:.2f} ms" for name in TIMES}
    (table,) = (text for text in messages if text.startswith("Low-rank compression at"))
    said = " ".join(table.rpartition("\nA run on")[2].split())
    assert said.startswith(
        f"the `example_input_array` takes {logged['_after']}, and took {logged['_before']} before; {logged['']} were "
        "predicted."
    )
    if share < 1:
        assert "That is far off: either the machine was busy, now or when" in said
        assert str(folder()).replace(" ", "") in said.replace(" ", "")


class Steps(Callback):
    """Count what has been said when the training begins, and the batches."""

    def __init__(self, messages):
        self.messages, self.told, self.count = messages, 0, 0

    def on_train_start(self, trainer, pl_module):
        self.told = sum("can go down to" in text and "microseconds" in text for text in self.messages)

    def on_train_batch_start(self, *_):
        self.count += 1


@pytest.mark.parametrize("example", [None, torch.zeros(128, 64)], ids=["first batch", "example"])
def test_a_run_says_what_can_be_reached_in_time(tmp_path, messages, example):
    module, steps = Wide(), Steps(messages)
    module.example_input_array = example
    run(compression(), tmp_path, module, more=[steps])
    # Without an example it is said as the training begins, right after the callbacks before this one.
    assert (steps.told, steps.count) == (1, 4)
    assert sum("can go down to" in text for text in messages) == 1


@pytest.mark.parametrize("with_example", [True, False])
def test_times_are_of_the_precision_of_the_steps(tmp_path, with_example):
    module = Wide()
    module.example_input_array = torch.zeros(128, 64) if with_example else None
    run(
        lrc.LowRankCompression(1.0, cost="latency", method=METHOD, refit=None), tmp_path, module, precision="bf16-mixed"
    )
    (written,) = folder().rglob("*.json")
    inputs = set(re.findall(r"128x(?:64|1024) [^\"]*", written.read_text()))
    assert inputs and all("autocast bfloat16" in one for one in inputs)


@pytest.mark.parametrize("example", [None, torch.zeros(128, 64)], ids=["first batch", "example"])
def test_a_time_out_of_reach_is_refused_as_soon_as_it_is_known(tmp_path, messages, example):
    module, steps, callback = Wide(), Steps(messages), compression(0.001)
    module.example_input_array = example
    with pytest.raises(ValueError, match=r"the budget must be at least [\d,]+ microseconds, got"):
        run(callback, tmp_path, module, more=[steps])
    assert callback.allocation is None
    assert steps.count == 0


def test_the_times_of_a_run_are_those_of_its_checkpoints(tmp_path):
    """Another measurement would give other ranks: a resumed run must go on as the run before would have."""
    callback, file, again = compression(), tmp_path / "before.ckpt", compression()
    run(callback, tmp_path, more=[Saves(file)])
    run(again, tmp_path, ckpt_path=file)
    assert again._counting.observation == callback._counting.observation
    assert again.allocation == callback.allocation is not None


@pytest.mark.situation("Goals", "a budget in measured time, resumed on another device", "works, measured again")
def test_times_of_another_device_are_measured_again(tmp_path):
    file = tmp_path / "elsewhere.ckpt"
    run(compression(), tmp_path, more=[Saves(file)])
    written = torch.load(file, weights_only=True)
    state = next(one for name, one in written["callbacks"].items() if name.startswith("LowRankCompression"))
    state["observation"]["latencies"]["device"]["name"] = "another processor"
    torch.save(written, file)
    module, again = Wide(), compression()
    module.example_input_array = torch.zeros(128, 64)
    with pytest.warns(UserWarning, match="has no times of this device, they are measured again"):
        run(again, tmp_path, module, ckpt_path=file)
    assert again._counting.observation.latencies.device == device_facts(torch.device("cpu"))
    assert again.allocation is not None


def test_a_resumed_run_with_other_patterns_measures_what_it_lacks(tmp_path):
    file = tmp_path / "before.ckpt"
    first, again, module = compression(include=["network.2"]), compression(), Wide()
    run(first, tmp_path, more=[Saves(file)])
    assert list(first._counting.observation.latencies.layers) == ["network.2"]
    module.example_input_array = torch.zeros(128, 64)
    with pytest.warns(UserWarning, match="no times of all layers that may be factorized now, they are measured again"):
        run(again, tmp_path, module, ckpt_path=file)
    assert set(again._counting.observation.latencies.layers) == {"network.0", "network.2", "network.4"}


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_file_of_another_device_ends_the_run_before_a_step(tmp_path, epochs):
    run(compression(), tmp_path)
    (file,) = folder().iterdir()
    written = json.loads(file.read_text("utf-8"))
    written["device"]["threads"] = 99
    file.write_text(json.dumps(written), encoding="utf-8")
    module = Wide()
    module.example_input_array = torch.zeros(128, 64)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"must be of this device, and is of another \(threads: 99, here"):
        run(compression(epochs=epochs), tmp_path, module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_at_epoch_0_a_batch_of_the_training_takes_the_place_of_an_example(tmp_path):
    callback = compression(epochs=0)
    run(callback, tmp_path)
    assert callback.allocation.cost <= callback.allocation.budget < callback.allocation.dense_cost


def test_time_beside_parameters(tmp_path):
    callback = lrc.LowRankCompression(budget={"parameters": 0.6, "latency": 0.9}, method=METHOD, refit=None)
    run(callback, tmp_path)
    found = callback.allocation
    assert found.cost <= 0.6 * found.dense_cost
    assert found.others["latency"].cost <= found.others["latency"].budget
