"""What pages show, taken out of them and run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

import lr_callback as lrc
from lr_callback.commands.compression_cli import CompressionCLI
from lr_callback.recipes import DigitsData, ImageClassifier

ROOT = Path(__file__).resolve().parents[1]
_FENCED = re.compile(
    r"^(?P<fence>```+)(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)$", flags=re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of code on a page: its language, its text, and the line that it begins after."""

    language: str
    text: str
    line: int


def written_pages() -> list[str]:
    """Return the pages of the repository, by their paths in it."""
    listed = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in listed)


def all_blocks(page: str) -> list[Block]:
    """Return the blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = _FENCED.finditer(text)
    return [Block(one["language"], one["text"], text[: one.start("text")].count("\n")) for one in found]


def blocks(page: str, language: str) -> list[str]:
    """Return the texts of the blocks of a language in a page, in their order."""
    return [one.text for one in all_blocks(page) if one.language == language]


def pages_with(language: str, but: tuple[str, ...] = ()) -> list[str]:
    """Return the pages that have a block of a language, but for some."""
    return [page for page in written_pages() if page not in but and blocks(page, language)]


def script(page: str) -> str:
    """Return the Python of a page as one program, each line where it stands on the page."""
    lines: list[str] = []
    for block in all_blocks(page):
        if block.language == "python":
            lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    return "\n".join([*lines, ""])


def run_python(page: str) -> dict[str, Any]:
    """Run the Python of a page from top to bottom, in the folder of the process; return the names that it makes."""
    module = ModuleType(f"page_{Path(page).stem}")
    with _known(module):
        exec(compile(script(page), page, "exec"), vars(module))
    return vars(module)


@contextmanager
def _known(module: ModuleType) -> Iterator[None]:
    """Let classes of a page be found by the name of their module, as those of a file are."""
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]


def configured(text: str, folder: Path) -> tuple[lrc.LowRankCompression, dict[str, Any]]:
    """Parse a block of YAML as the command line would; return the callback, and what was written for it."""
    written = yaml.safe_load(text)
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    cli = (CompressionCLI if "compress" in written else LightningCLI)(
        ImageClassifier,
        DigitsData,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
        args=["--config", str(file), "--model.network", "lr_callback.recipes.CifarResNet"],
    )
    [found] = [one for one in cli.trainer.callbacks if isinstance(one, lrc.LowRankCompression)]
    return found, written.get("compress") or written["trainer"]["callbacks"][0]["init_args"]


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page, each in words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.strip()]


def extras() -> set[str]:
    """Return the names of the package's extras."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = settings.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", table, flags=re.MULTILINE))
