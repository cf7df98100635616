"""What a figure was measured with, and how results are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from lr_callback.commands.study import environment as study

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Return the date, the versions, the processor and the number of threads."""
    return {"date": date.today().isoformat(), **study.environment()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def keep(name: str, title: str, command: str, figures: dict[str, Any], table: str) -> None:
    """Write ``results/NAME.json`` with the environment, and ``results/NAME.md`` with the table; print the table."""
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    written = {"title": title, "command": command, "environment": where, **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    text = f"# {title}\n\n    {command}\n\n{table}\n\nMeasured with: {facts}.\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
