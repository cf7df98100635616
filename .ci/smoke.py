"""Use the installed package as one does who has nothing of its source: ``python .ci/smoke.py``; it needs mypy, too."""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, ImageClassifier

TYPED = """import torch
import lr_callback as lrc
allocation = lrc.allocate(torch.nn.Linear(64, 64), keep_ratio=0.5)
cost: int = allocation.cost
wrong: str = lrc.LowRankCompression(keep_ratio=0.5, epochs=1).events
"""
COMMAND = [f"{get_path('scripts')}/lr-callback"]


def output(*command: str, code: int = 0) -> str:
    """Run a command; return what it printed."""
    done = subprocess.run(command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command} ended with {done.returncode}, not {code}: {done.stdout}{done.stderr}"
    return done.stdout


def check_installed() -> None:
    """Check that it is the installed package, and that its version is one everywhere."""
    found, source = Path(lrc.__file__).resolve(), Path(__file__).resolve().parents[1]
    assert source not in found.parents, f"imported from the source, {found}"
    assert version("lr_callback") == lrc.__version__
    for command in (COMMAND, [sys.executable, "-m", "lr_callback"]):
        assert output(*command, "--version") == f"lr_callback {lrc.__version__}\n"


def check_types(folder: str) -> None:
    """Check that a type checker sees the types: it finds the one mistake."""
    program = Path(folder) / "typed.py"
    program.write_text(TYPED)
    said = output(sys.executable, "-m", "mypy", "--strict", str(program), code=1)
    assert 'typed.py:5: error: Incompatible types in assignment (expression has type "dict[int, ' in said, said
    assert "Found 1 error in 1 file" in said, said


def check_analyze() -> None:
    """Check the command line's look at a model."""
    model = ["--model", "lr_callback.recipes.CifarResNet", "--model.depth", "8"]
    assert "layers factorized" in output(*COMMAND, "analyze", *model, "--keep_ratio", "0.4")


def check_fit(folder: str) -> None:
    """Check that a Trainer compresses, and that its checkpoint gives the network back."""
    seed_everything(0)
    data = DataLoader(TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(10, (256,))), batch_size=64)
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1))
    callback = lrc.LowRankCompression(keep_ratio=0.4, epochs=1)
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=folder, callbacks=[callback])
    trainer.fit(model, data)
    fresh = CifarResNet(depth=8, in_channels=1)
    lrc.restore_(fresh, trainer.checkpoint_callback.best_model_path)
    assert sum(one.numel() for one in fresh.parameters()) == callback.allocation.cost <= 0.4 * 75_002
    images = torch.randn(8, 1, 8, 8)
    assert torch.equal(fresh.eval()(images), model.network.eval()(images))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        check_installed()
        check_types(temporary)
        check_analyze()
        check_fit(temporary)
    print(f"lr_callback {lrc.__version__} works as installed")
