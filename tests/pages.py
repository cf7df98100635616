"""Code blocks of a page, found and run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of a language in a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_python(page: str) -> dict[str, object]:
    """Run the python blocks of a page from top to bottom, in this folder, and return the names that they leave."""
    names: dict[str, object] = {"__name__": "page"}
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
    return names
