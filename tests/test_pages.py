"""Every block of code on every page runs, or is what the command line takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from lr_callback.cli import main
from lr_callback.layers.layer_types import LAYER_TYPES
from tests.pages import (
    ROOT,
    all_blocks,
    blocks,
    commands,
    configured,
    extras,
    pages_with,
    run_python,
    script,
    written_pages,
)

pytest.importorskip("sklearn")

OWN_TEST = ("README.md", "docs/EXPORT.md", "docs/METRICS.md")  # tests of their own look at what their Python does
AS_A_FILE = ("docs/DDP.md",)  # starts itself in further processes
MEASURED = ("docs/SPEED.md",)  # decides by times
NOT_RUN = {"text", "bibtex"}  # is no code
# Programs of others, and what the tests of the package run in other ways.
KNOWN = ("pytest", "pre-commit install", "lr-callback study --config", "lr-callback fit --config")
pytestmark = [
    # Lightning calls methods of its parser that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # A page measures times while other tests run.
    pytest.mark.filterwarnings("ignore:Latency. :UserWarning"),
    # Each Trainer of a page has a folder of its own.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LR_CALLBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["lr-callback"])
    types = dict(LAYER_TYPES)
    yield tmp_path
    LAYER_TYPES.clear()
    LAYER_TYPES.update(types)


@pytest.mark.parametrize("page", pages_with("python", but=(*OWN_TEST, *AS_A_FILE, *MEASURED)))
def test_python_runs_from_top_to_bottom(page):
    run_python(page)


@pytest.mark.parametrize("page", MEASURED)
def test_python_that_measures_times_runs(page, monkeypatch):
    # Other tests run at the same time: no spread is too large, and what they disturb is measured again.
    monkeypatch.setattr(sys.modules["lr_callback.units.latency.trust"], "SPREAD_REFUSED", float("inf"))
    for attempt in range(3):
        monkeypatch.setenv("LR_CALLBACK_CACHE", f"cache-{attempt}")
        try:
            run_python(page)
            return
        except ValueError as error:
            assert attempt < 2 and "keep_ratio" in str(error)


def run_file(name: str) -> str:
    """Run a program in the folder of the process, on one core; return what it printed."""
    done = subprocess.run(
        [sys.executable, name],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_several_processes(folder):
    (folder / "train.py").write_text(script("docs/DDP.md"), encoding="utf-8")
    counts = dict(re.findall(r"process (\d): (\d+) parameters", run_file("train.py")))
    assert set(counts) == {"0", "1"} and counts["0"] == counts["1"]
    assert int(counts["0"]) <= 0.4 * (64 * 128 + 128 + 128 * 10 + 10)


OTHERS = """
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from train import Sharded, in_a_notebook

if __name__ == "__main__":
    module, allocation = in_a_notebook()
    print("child processes:", sum(one.numel() for one in module.parameters()) == allocation.cost)
    shards = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=shards, max_epochs=1, logger=False)
    module = Sharded()
    trainer.fit(module)
    print("sharded:", {type(one.data).__name__ for one in module.parameters()}, len(list(module.parameters())))
"""


def test_child_processes_and_shards(folder):
    (folder / "train.py").write_text(script("docs/DDP.md"), encoding="utf-8")
    (folder / "others.py").write_text(OTHERS, encoding="utf-8")
    shown = run_file("others.py")
    assert "child processes: True" in shown
    assert "sharded: {'DTensor'} 6" in shown


@pytest.mark.parametrize(
    ("page", "block"), [(page, block) for page in pages_with("yaml") for block in blocks(page, "yaml")]
)
def test_yaml_is_what_the_command_line_takes(page, block, folder):
    callback, written = configured(block, folder)
    ratios, epochs = written["keep_ratio"], written.get("epochs", 1)
    assert callback.events == (dict(zip(epochs, ratios, strict=True)) if isinstance(epochs, list) else {epochs: ratios})


def test_yaml_that_the_command_line_does_not_take_is_found(folder, capsys):
    with pytest.raises(SystemExit):
        configured("compress:\n  keep_rate: 0.5\n", folder)
    assert "keep_rate" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    few = [f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
    short = ["--trainer.max_epochs=2", "--compress.epochs=1", "--model.init_args.schedule=constant"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lr-callback"])
        main(["fit", "--config", str(ROOT / "configs" / "digits.yaml"), *short, *few, *quiet])
    return folder


def listed_commands() -> list[tuple[str, list[str]]]:
    return [(page, words) for page in written_pages() for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), [one for one in listed_commands() if one[1][0] == "pip"])
def test_what_is_to_be_installed_is_an_extra(page, words):
    *start, what = words
    assert start in (["pip", "install"], ["pip", "install", "-e"])
    assert set(re.fullmatch(r"(?:\.|lr_callback)\[(.*)\]", what)[1].split(",")) <= extras()


def runs_here(words: list[str]) -> bool:
    return words[0] != "pip" and not " ".join(words).startswith(KNOWN)


@pytest.mark.parametrize(("page", "words"), [one for one in listed_commands() if runs_here(one[1])])
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs pip install 'lr_callback[export]'")
def test_commands_run(page, words, trained, folder, capsys):
    program, *arguments = words
    assert program == "lr-callback"
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    version = folder / "lightning_logs" / "version_0"
    shutil.copy(version / "config.yaml", folder)
    [checkpoint] = (version / "checkpoints").iterdir()
    checkpoint.rename(folder / arguments[arguments.index("--checkpoint") + 1])
    main(arguments)
    assert capsys.readouterr().out


def test_files_that_commands_name_exist():
    for _, words in listed_commands():
        for option, value in pairwise(words):
            assert option != "--config" or (ROOT / value).is_file(), value


@pytest.mark.parametrize("page", written_pages())
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:benchmarks|configs|docs|examples|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", text)) <= tests


def test_every_block_is_one_that_is_run():
    for page in written_pages():
        for block in all_blocks(page):
            assert block.language in {"python", "yaml", "bash"} | NOT_RUN, f"{page}, line {block.line}"
    for page in OWN_TEST:
        stem = Path(page).stem.lower()
        name = "test_readme.py" if stem == "readme" else f"test_{stem}_page.py"
        assert f'run_python("{page}")' in (ROOT / "tests" / name).read_text(encoding="utf-8")
