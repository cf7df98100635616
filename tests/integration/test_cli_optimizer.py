"""LightningCLI with ``optimizer:`` in the YAML: its optimizer is made before a checkpoint is read."""

import os
import subprocess
import sys

import pytest
import torch

MAIN = """
import sys, torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lr_callback

torch.set_num_threads(1)

class Base(LightningModule):
    pass

class Net(Base):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))
    def training_step(self, batch, batch_idx):
        return (self.network(batch[0]) - batch[0]).square().mean()

class Resumable(DataLoader):
    done = start = 0
    def __iter__(self):
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = index + 1
                yield batch
    def state_dict(self):
        return {"done": self.done}
    def load_state_dict(self, state):
        self.start = state["done"] % len(self)

class Data(LightningDataModule):
    def train_dataloader(self):
        return Resumable(TensorDataset(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))), 8)

if __name__ == "__main__":
    config, *rest = sys.argv[1:]
    sys.argv = sys.argv[:1]
    for ckpt_path, end in zip(rest[::2], rest[1::2]):
        arguments = ["fit", "--config", config, *(["--ckpt_path", ckpt_path] if ckpt_path != "none" else [])]
        cli = LightningCLI(
            Base, Data, args=arguments, subclass_mode_model=True, save_config_kwargs={"overwrite": True}
        )
        cli.trainer.save_checkpoint(end)
        loaded = lr_callback.load_from_checkpoint(Base, end)
        assert type(loaded) is Net and loaded.network[0].in_features == 32
        for name, value in cli.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
"""

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 4
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: .
  callbacks:
    - class_path: lr_callback.LowRankCompression
      init_args: {keep_ratio: [0.7, 0.5], epochs: [1, 3], show_table: false}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FILES, filename: "{step}", save_top_k: -1, every_n_train_steps: 1}
model:
  class_path: __main__.Net
  init_args: {width: 24}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.01}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.StepLR
  init_args: {step_size: 1, gamma: 0.7}
"""
STEPS = (2, 4, 6, 8, 11, 13)
"""Before, at and after each of the two compressions, in the middle of epochs and at their turn."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Return the last files of a whole run, and of those that went on from one of its steps in another process."""
    root = tmp_path_factory.mktemp("cli")
    (root / "main.py").write_text(MAIN, encoding="utf-8")

    def run(config, *pairs):
        (root / "config.yaml").write_text(config, encoding="utf-8")
        program = [sys.executable, "main.py", "config.yaml", *pairs]
        how = {"cwd": root, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 200}
        done = subprocess.run(program, capture_output=True, text=True, check=False, **how)
        assert done.returncode == 0, done.stderr

    run(CONFIG.replace("FILES", "files"), "none", "whole.ckpt")
    pairs = [part for step in STEPS for part in (f"files/step={step}.ckpt", f"{step}.ckpt")]
    run(CONFIG.replace("FILES", "again"), *pairs)
    return {name: torch.load(root / f"{name}.ckpt", weights_only=True) for name in ("whole", *map(str, STEPS))}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.situation("Checkpoints", "LightningCLI with `optimizer:` in the YAML, resumed in another process", "works")
def test_run_of_lightning_cli_is_resumed_bit_for_bit(ends, step):
    whole, found = ends["whole"], ends[str(step)]
    assert "network.0.encoder.weight" in whole["state_dict"]
    assert whole["hyper_parameters"]["_class_path"] == "__main__.Net"
    for name, value in whole["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    [one], [other] = whole["optimizer_states"], found["optimizer_states"]
    assert one["param_groups"] == other["param_groups"]
    for index, state in one["state"].items():
        assert all(torch.equal(value, other["state"][index][name]) for name, value in state.items())
    assert found["lr_schedulers"] == whole["lr_schedulers"]
