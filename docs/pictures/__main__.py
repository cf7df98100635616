"""Draw the pictures of ``docs/METHOD.md``: ``python docs/pictures`` writes them anew."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

NAMES = ("folding", "slicing", "truncation", "line", "cut")


def main() -> None:
    """Write each picture beside the file that draws it."""
    for name in NAMES:
        text = import_module(name).draw().svg()
        Path(__file__).with_name(f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
