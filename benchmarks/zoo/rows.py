"""Rows: what was found for each model, kept in one file that shards write side by side, and the page made of it."""

from __future__ import annotations

import fcntl
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, markdown

Row = dict[str, Any]
"""Of one model, plain data."""

ROWS = RESULTS / "zoo.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "ZOO.md"

_SHORT = (
    (r"(\w+) is not among the layer types.*", r"type \1"),
    (r"its weight is tied to .*", "tied"),
    (r"groups=\d+.*|depthwise.*", "groups"),
    (r"all its weights are zero.*", "zero"),
    (r"too small.*", "too small"),
    (r"its weight is computed .*", "computed"),
    (r"read directly by .*", "attention"),
)
"""Pattern of a reason -> the word for it in the table."""


def short(reason: str) -> str:
    """Return the word for a reason; the reason itself without what follows a colon where there is none."""
    for pattern, word in _SHORT:
        if re.fullmatch(pattern, reason):
            return re.sub(pattern, word, reason)
    return re.split(r"[:;]", reason)[0]


def read(path: Path = ROWS) -> list[Row]:
    """Return all rows, in the order of their keys."""
    return _parsed(path.read_text(encoding="utf-8")) if path.is_file() else []


def update(row: Row, path: Path = ROWS) -> None:
    """Put a row into the file in place of an older one of the same model; several processes may do so at once."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {one["key"]: one for one in _parsed(file.read())} | {row["key"]: row}
        file.truncate(0)
        file.writelines(json.dumps(rows[key]) + "\n" for key in sorted(rows))


def _parsed(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


_INTRODUCTION = """# The zoo

Every model that torchvision lists, and models of timm and transformers of many families, with random weights. Each is
analysed, cut to half of its parameters or to what it can reach, run in eval and in train mode, differentiated, written
to a state dict, restored from it into a fresh dense model, and made dense again. What must hold:

- the cost that was reported is the number of parameters of what was built;
- each pair of factors has finite gradients where the dense weight had one;
- the restored model gives the same outputs, bit for bit;
- the factors multiplied back give the same outputs, to a thousandth of the largest, and the names of the dense model.

`python -m benchmarks.zoo` (`make zoo`) writes this page and `benchmarks/results/zoo.jsonl`, in shards if asked:
`make zoo SHARD=1/4`. Inputs are small, such as 2 images of 64 x 64; transformers have tiny configurations.

Left out: the integer form of `torchvision.models.quantization`, which has nothing to train; its models are here as they
are before they are quantized. Of timm, one or a few of the smallest models of each family.
"""

_LEGEND = """## How to read the tables

*layers* have a weight with two or more axes; *cut* of them are factorized, *dense* of them are cheaper or better dense,
the rest are skipped, with a word for the reason and the number of layers. *kept* is of the parameters of the whole
model, fixed ones included. *error* is the largest slice error of a layer; random weights have no small singular
values. *difference* is that of the outputs of factors and of their product. *seconds* are those that the
analysis keeps one core busy.
"""


def page(rows: Sequence[Row]) -> str:
    """Return the page of all rows."""
    parts = [_INTRODUCTION, _summary(rows), _LEGEND]
    for package in sorted({row["package"] for row in rows}):
        own = [row for row in rows if row["package"] == package]
        parts += [f"## {package}\n", _table(own) + "\n"]
    parts += ["## Skipped layers\n", _reasons(rows) + "\n", "## Measured with\n", environment_of(rows) + "\n"]
    return "\n".join(parts)


def _count(rows: Iterable[Row], holds: Callable[[Row], bool]) -> int:
    return sum(1 for row in rows if holds(row))


def _summary(rows: Sequence[Row]) -> str:
    packages = Counter(row["package"] for row in rows)
    kinds = Counter(row["status"].partition(":")[0] for row in rows)
    full = [row for row in rows if row["status"] == "ok"]
    above = _count(full, lambda row: row["keep_ratio"] > 0.5)
    cut, layers = (sum(row[name] for row in full) for name in ("factorized", "layers"))
    return (
        f"{len(rows)} models: {', '.join(f'{number} of {name}' for name, number in sorted(packages.items()))}. "
        f"{', '.join(f'{number} {kind}' for kind, number in kinds.most_common())}.\n"
        f"{cut:,} of {layers:,} layers are factorized. {above} models cannot be cut to a half, for what is in layers\n"
        "that are skipped, and are cut as far as they can be.\n"
    )


_HEADER = ("model", "parameters", "layers", "cut", "dense", "skipped", "kept", "error", "difference", "seconds")


def _table(rows: Sequence[Row]) -> str:
    lines = [_line(row) for row in rows]
    return markdown([*_HEADER, "status"], lines)


def _line(row: Row) -> list[str]:
    if "factorized" not in row:
        known = [f"{row['parameters']:,}", str(row["layers"]), "0", "", _words(row)] if "skipped" in row else [""] * 5
        return [row["name"], *known, "", "", "", "", row["status"]]
    return [
        row["name"],
        f"{row['parameters']:,}",
        str(row["layers"]),
        str(row["factorized"]),
        str(row["stay_dense"]),
        _words(row),
        f"{row['kept']:.1%}",
        f"{row['worst_error']:.3f}",
        f"{row['difference']:.0e}",
        f"{row['processor_seconds']:.1f}" if "processor_seconds" in row else "",
        row["status"],
    ]


def _by_word(row: Row) -> Counter[str]:
    words: Counter[str] = Counter()
    for reason, number in row.get("skipped", {}).items():
        words[short(reason)] += number
    return words


def _words(row: Row) -> str:
    return ", ".join(f"{word} {number}" for word, number in _by_word(row).most_common())


def _reasons(rows: Sequence[Row]) -> str:
    layers: Counter[str] = Counter()
    models: Counter[str] = Counter()
    example: dict[str, str] = {}
    for row in rows:
        words = _by_word(row)
        layers.update(words)
        models.update(words.keys())
        for reason in row.get("skipped", {}):
            example.setdefault(short(reason), reason)
    return markdown(
        ["word", "layers", "models", "reason, for example"],
        [[word, f"{number:,}", models[word], example[word]] for word, number in layers.most_common()],
    )


def environment_of(rows: Sequence[Row]) -> str:
    """Return a list of what rows were measured with."""
    facts: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row["environment"].items():
            facts.setdefault(name, set()).add(str(value))
    return "\n".join(f"- {name}: {', '.join(sorted(values))}" for name, values in facts.items())
