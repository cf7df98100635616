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


def accuracies(text: str, metric: str = "accuracy") -> dict[str, tuple[float, int]]:
    """Return the metric and the number of parameters of each stage, of lines such as ``cut: accuracy 0.5 with 9``."""
    lines = re.findall(rf"^(.+): {metric} ([\d.]+) with ([\d,]+) parameters$", text, flags=re.MULTILINE)
    return {name: (float(value), int(kept.replace(",", ""))) for name, value, kept in lines}


def test_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.py)` ", page, flags=re.MULTILINE)) == {one.name for one in EXAMPLES.glob("*.py")}


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


class TestLonger:
    """Those that train several networks, or in several processes; a class, so that another worker may take them."""

    def test_resume(self, tmp_path):
        text = run(tmp_path, "resume.py")
        assert "broke down in epoch 5" in text
        begun = number(r"new process: begins with epoch 5, ([\d,]+) parameters", text)
        assert number(r"uninterrupted: ([\d,]+) parameters", text) == begun <= 0.4 * 19_074
        assert "same weights, bit for bit: True" in text

    def test_gradual_distillation(self, tmp_path):
        text = run(tmp_path, "gradual_distillation.py")
        lines = re.findall(r"^(.+?) +([\d,]+) parameters \( *[\d.]+%\)  test accuracy ([\d.]+)$", text, re.MULTILINE)
        found = {name: (int(kept.replace(",", "")), float(accuracy)) for name, kept, accuracy in lines}
        assert list(found) == ["dense control", "at once", "in steps", "in steps, distilled"]
        dense, accuracy = found.pop("dense control")
        assert accuracy > 0.95
        assert all(0.1 * dense < kept <= 0.15 * dense for kept, _ in found.values())
        assert min(found["in steps"][1], found["in steps, distilled"][1]) > 0.8

    def test_hyper_parameters(self, tmp_path):
        text = run(tmp_path, "hyper_parameters.py")
        rows = re.findall(r"^keep_ratio ([\d.]+)  (.+?) +val_accuracy ([\d.]+)  wanted ([\d.]+)$", text, re.MULTILINE)
        assert len(rows) == 9
        good = [(float(keep), name) for keep, name, accuracy, wanted in rows if float(accuracy) >= float(wanted)]
        ((chosen, keep, accuracy),) = re.findall(r"chosen, (.+) at ([\d.]+): .*test accuracy ([\d.]+)", text)
        assert float(keep) == min(good)[0] and (float(keep), chosen) in good
        assert float(accuracy) > 0.9


class TestOther:
    """Other tasks than digits; a class, so that another worker may take them."""

    def test_text_classifier(self, tmp_path):
        found = accuracies(run(tmp_path, "text_classifier.py"))
        assert list(found) == ["dense control", "dense", "cut", "final"]
        assert found["dense"][1] == found["dense control"][1]
        assert found["cut"][1] == found["final"][1] <= 0.1 * found["dense"][1]
        assert found["dense control"][0] > 0.95
        assert found["final"][0] > 0.9

    def test_segmentation(self, tmp_path):
        found = accuracies(run(tmp_path, "segmentation.py"), "mean IoU")
        assert list(found) == ["dense control", "dense", "cut", "final"]
        assert found["cut"][1] == found["final"][1] <= 0.25 * found["dense"][1]
        assert found["dense control"][0] > 0.6
        assert found["final"][0] > 0.5


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs pip install 'lr_callback[export]'")
def test_export_serve(tmp_path):
    text = run(tmp_path, "export_serve.py")
    ((dense, written),) = re.findall(r"^onnx +([\d,]+) +[\d,]+ +([\d,]+) ", text, flags=re.MULTILINE)
    assert int(written.replace(",", "")) < 0.2 * int(dense.replace(",", ""))
    assert number(r"served: accuracy ([\d.]+)", text) > 0.8
    assert (
        number(r"same answers as the model: (\d+) of 360", text) >= 359
    )  # a tie of two scores may be broken otherwise


def test_multi_node_without_torchrun_says_how_it_is_started(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    command = [sys.executable, str(EXAMPLES / "multi_node.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("multi_node.py must be started by torchrun")
    assert last.endswith("torchrun --standalone --nproc_per_node=2 examples/multi_node.py")


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


@pytest.mark.skipif(
    find_spec("ray") is None, reason="needs pip install 'lr_callback[ray]', which is not in the extra dev: 500 MB"
)
@pytest.mark.situation("Strategies", "Ray Train, TorchTrainer with RayDDPStrategy", "works")
def test_ray_train(tmp_path):
    text = run(tmp_path, "ray_train.py", "--epochs=6")
    before, after = (
        number(rf"2 workers: {form} parameters", text) for form in (r"([\d,]+) -> [\d,]+", r"[\d,]+ -> ([\d,]+)")
    )
    assert after <= 0.3 * before
    assert number(r"val_accuracy ([\d.]+)$", text.strip()) > 0.5
