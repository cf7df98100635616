"""Draw the pictures of ``docs/METHOD.md``: ``python docs/pictures`` writes them anew."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

NAMES = ("folding", "slicing", "truncation", "line", "cut")


def main(folder: Path) -> None:
    """Write each picture into a folder."""
    for name in NAMES:
        (folder / f"{name}.svg").write_text(import_module(name).draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
