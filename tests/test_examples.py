"""Each program in ``examples/`` runs and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run an example on one core, its files in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
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
