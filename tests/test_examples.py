"""Each program in ``examples/`` runs and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run an example on one core, its files in a folder; return what it printed."""
    return printed(folder, str(EXAMPLES / name), *arguments)


def printed(folder: Path, *arguments: str) -> str:
    """Run Python on one core; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern, text)
    return float(found.replace(",", ""))


def totals(text: str) -> tuple[int, int]:
    """Return the parameters before and after, of the line below the table."""
    ((before, after),) = re.findall(r"layers factorized: ([\d,]+) -> ([\d,]+) parameters", text)
    return int(before.replace(",", "")), int(after.replace(",", ""))


def test_plain_pytorch(tmp_path):
    text = run(tmp_path, "plain_pytorch.py")
    before, after = totals(text)
    assert after <= 0.1 * before
    dense = number(r"dense: accuracy ([\d.]+)", text)
    cut = number(r"right after the cut: accuracy ([\d.]+)", text)
    tuned = number(r"fine-tuned: accuracy ([\d.]+)", text)
    assert cut < dense
    assert tuned > 0.9
    assert number(r"saved: ([\d,]+) bytes", text) < 4 * 0.15 * before
    assert "restored: same outputs True" in text


def test_trainer(tmp_path):
    text = run(tmp_path, "trainer.py")
    dense = number(r"dense: ([\d,]+) parameters", text)
    after = number(r"after epoch 12: ([\d,]+) parameters", text)
    assert after <= 0.3 * dense
    assert number(r"resumed, after epoch 14: ([\d,]+) parameters", text) == after
    assert number(r"restored: ([\d,]+) parameters", text) == after
    assert number(r"test_accuracy\W+([\d.]+)", text) > 0.9


def test_lightning_cli(tmp_path):
    text = run(tmp_path, "lightning_cli.py", "fit", "--config", str(EXAMPLES / "lightning_cli.yaml"))
    assert "Low-rank compression at the start of epoch 6" in text
    before, after = totals(text)
    assert after <= 0.25 * before
    assert f"with {after:,} parameters" in text
    assert number(r"val_accuracy ([\d.]+) with", text) > 0.85


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs pip install 'lr_callback[export]'")
def test_export_serve(tmp_path):
    text = run(tmp_path, "export_serve.py")
    ((dense, written),) = re.findall(r"^onnx +([\d,]+) +([\d,]+) ", text, flags=re.MULTILINE)
    assert int(written.replace(",", "")) < 0.2 * int(dense.replace(",", ""))
    assert number(r"served: accuracy ([\d.]+)", text) > 0.8
    assert (
        number(r"same answers as the model: (\d+) of 360", text) >= 359
    )  # a tie of two scores may be broken otherwise


@pytest.mark.situation("Strategies", "DDP as on several machines, started by torchrun", "works")
def test_multi_node(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    program = str(EXAMPLES / "multi_node.py")
    text = printed(tmp_path, *launch, program, "--epochs=6", f"--folder={tmp_path / 'files'}")
    assert text.count("2 processes: ") == 1, "one of them prints"
    before, after = (
        number(rf"2 processes: {form} parameters", text) for form in (r"([\d,]+) -> [\d,]+", r"[\d,]+ -> ([\d,]+)")
    )
    assert after <= 0.3 * before
    assert number(r"test_accuracy\W+([\d.]+)", text) > 0.8
    assert (tmp_path / "files" / "last.ckpt").is_file()


@pytest.mark.skipif(find_spec("ray") is None, reason="needs pip install 'ray[train]'")
@pytest.mark.situation("Strategies", "Ray Train, TorchTrainer with RayDDPStrategy", "works")
def test_ray_train(tmp_path):
    text = run(tmp_path, "ray_train.py", "--epochs=4")
    before, after = (
        number(rf"2 workers: {form} parameters", text) for form in (r"([\d,]+) -> [\d,]+", r"[\d,]+ -> ([\d,]+)")
    )
    assert after <= 0.3 * before
    assert number(r"val_accuracy ([\d.]+)$", text.strip()) > 0.5
