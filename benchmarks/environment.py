"""What a figure was measured with, and how results are kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lr_callback", "torch", "torchvision", "lightning", "torchmetrics", "numpy")


def environment() -> dict[str, Any]:
    """Return the versions, the processor and the number of threads."""
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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
