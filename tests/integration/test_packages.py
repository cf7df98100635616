"""A Trainer and a LightningCLI of `pytorch_lightning` do what those of `lightning` do, whatever is imported first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ORDERS = {
    "lightning alone": "import lightning.pytorch as pl",
    "pytorch_lightning first": "import pytorch_lightning as pl",
    "the callback first": "from lr_callback import LowRankCompression; import pytorch_lightning as pl",
}
MODEL = """
    import sys
    sys.path.append({tests!r})
    {imports}
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self, width: int = 24):
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

        def train_dataloader(self):
            images = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
            return DataLoader(TensorDataset(images, (images.sum(1) > 0).long()), batch_size=16)

        val_dataloader = train_dataloader
"""
FIT = """
    import json
    from lr_callback import LowRankCompression
    callbacks = pl.callbacks
    average = callbacks.EMAWeightAveraging(decay=0.5)
    stopping = callbacks.EarlyStopping("loss", patience=20)
    best = callbacks.ModelCheckpoint("files", monitor="loss", save_last=True)
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append([stopping.wait_count, bool(torch.isfinite(stopping.best_score)), best.best_model_path != ""])

    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    compression = LowRankCompression([0.7, 0.4], [1, 2], show_table=False)
    trainer = pl.Trainer(max_epochs=4, callbacks=[average, compression, Look(), stopping, best], **quiet)
    module = Module()
    trainer.fit(module)
    resumed = [callbacks.EMAWeightAveraging(decay=0.5), LowRankCompression([0.7, 0.4], [1, 2])]
    again = pl.Trainer(max_epochs=5, callbacks=resumed, **quiet)
    again.fit(Module(), ckpt_path=best.last_model_path)
    class Judged(Module):
        def validation_step(self, batch, batch_idx):
            self.log("acc", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    torch.manual_seed(1)
    held = LowRankCompression(max_accuracy_drop=0.1)
    pl.Trainer(max_epochs=2, callbacks=[held], enable_checkpointing=False, **quiet).fit(Judged())
    refused = ""
    try:
        pruning = callbacks.ModelPruning("l1_unstructured", amount=0.1)
        pl.Trainer(callbacks=[pruning, LowRankCompression()], logger=False, accelerator="cpu").fit(Module())
    except Exception as error:
        refused = str(error)
    from LIGHTNING.cli import LightningCLI
    arguments = {"callbacks+": "lr_callback.LowRankCompression", "callbacks.epochs": 1, "callbacks.keep_ratio": 0.5}
    arguments |= {"max_epochs": 2, **{name: str(value).lower() for name, value in quiet.items()}}
    cli = LightningCLI(Module, args=["fit", *(f"--trainer.{name}={value}" for name, value in arguments.items())])
    shapes = [list(one.shape) for one in module.parameters()]
    print(json.dumps({
        "package": type(trainer).__module__.split(".")[0],
        "shapes": shapes,
        "sum": [float(one.sum()) for one in module.parameters()],
        "average": [list(one.shape) for one in average._average_model.module.parameters()] == shapes,
        "compressed": any("encoder" in name for name in torch.load(best.best_model_path)["state_dict"]),
        "seen": seen,
        "again": float(sum(one.sum() for one in again.lightning_module.parameters())),
        "command line": [type(cli.trainer).__module__, sum(one.numel() for one in cli.model.parameters())],
        "refused": refused[:60],
        "held": held.allocation.keep_ratio,
        "bases": [kind.__module__.split(".")[0] for kind in LowRankCompression.__mro__ if kind.__name__ == "Callback"],
    }))
"""


def run(folder, source, *arguments):
    """Run a file as a process of its own; return the last line that it printed."""
    script = folder / "main.py"
    script.write_text(dedent(source), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True, check=False, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def source(order, *parts):
    text = "".join(parts).replace("{imports}", ORDERS[order]).replace("{tests!r}", repr(str(Path(__file__).parent)))
    return text.replace("LIGHTNING", "lightning.pytorch" if order == "lightning alone" else "pytorch_lightning")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return what a run in each order of imports ended with."""
    return {order: json.loads(run(tmp_path_factory.mktemp("fit"), source(order, MODEL, FIT))[-1]) for order in ORDERS}


@pytest.mark.situation(
    "Other packages", "a Trainer and a LightningCLI of pytorch_lightning, whatever is imported first", "works"
)
@pytest.mark.parametrize("order", [one for one in ORDERS if one != "lightning alone"])
def test_trainer_of_pytorch_lightning_ends_as_that_of_lightning(outcomes, order):
    alone, found = outcomes["lightning alone"], outcomes[order]
    assert found.pop("package") == "pytorch_lightning"
    assert found.pop("bases") == ["lightning", "pytorch_lightning"]
    assert found.pop("command line") == ["pytorch_lightning.trainer.trainer", alone["command line"][1]]
    assert found == {name: alone[name] for name in found}


def test_everything_follows_and_is_refused_in_either(outcomes):
    one = outcomes["lightning alone"]
    assert (one["average"], one["compressed"], one["bases"], one["package"]) == (True, True, ["lightning"], "lightning")
    assert one["seen"] == [[0, False, False], [0, False, False], [0, False, False], [0, True, True]]
    assert one["refused"] == "LowRankCompression: the Trainer must have no ModelPruning, g"
    assert len(one["shapes"]) == 6
    assert one["command line"][1] < 16 * 24 + 24 + 24 * 10 + 10
