"""Files: the rows of a study on the disk, whole at every moment."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lr_callback.commands.study.environment import environment
from lr_callback.commands.study.rows import Row

NAME = "study"


class Store:
    """The files of a study in a folder: all rows ever written in ``study.json``, those of its plan in ``study.csv``.

    Args:
        folder: made, if it is not there.
        study: what is written beside the rows: the arguments of the command, as plain data.

    Raises:
        NotADirectoryError: If it is a file.
        ValueError: If there is a ``study.json`` that is none of a study.
    """

    def __init__(self, folder: Path, study: Mapping[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"`output` must be a folder, found the file {folder}; choose another name.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"`output` must be a folder that can be made, found that {folder} cannot ({error.strerror}); name "
                "another."
            ) from error
        self.folder, self.study = folder, dict(study)
        self.environments, self.rows = _read(folder / f"{NAME}.json")
        own = environment()
        if own not in self.environments:
            self.environments.append(own)
        self._environment = self.environments.index(own)

    def done(self, key: str, name: str) -> Row | None:
        """Return the row of equal settings, by the name that it has now; of one that made nothing, None."""
        found = next((row for row in self.rows if row.key == key and row.reason is None), None)
        return None if found is None else replace(found, method=name)

    def add(self, row: Row) -> None:
        """Add a row, in place of an earlier one of the same settings, and write the file."""
        self.rows = [one for one in self.rows if one.key != row.key]
        self.rows.append(replace(row, environment=self._environment))
        written = {
            "study": self.study,
            "environments": self.environments,
            "rows": [one.to_dict() for one in self.rows],
        }
        write_whole(self.folder / f"{NAME}.json", json.dumps(written, indent=1, default=str, allow_nan=False) + "\n")

    def write_csv(self, rows: Sequence[Row]) -> Path:
        """Write rows as CSV, one line each."""
        cells = [row.cells() for row in rows]
        text, names = io.StringIO(), list(dict.fromkeys(name for one in cells for name in one))
        table = csv.DictWriter(text, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(cells)
        return write_whole(self.folder / f"{NAME}.csv", text.getvalue())


def write_whole(path: Path, text: str) -> Path:
    """Write a file such that its name stands for the former text or for the new one, whenever it is looked at."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    return part.replace(path)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """Return the environments and the rows of a file; none, if it is not there."""
    if not path.exists():
        return [], []
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return list(written["environments"]), [Row(**row) for row in written["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`output`: {path} must be one that `lr-callback study` wrote, found something else "
            f"({type(error).__name__}: {error}); choose another folder, or remove it."
        ) from error
