"""``docs/ARCHITECTURE.md`` names the files that there are, on the floors that import-linter checks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lr_callback"
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def files() -> set[str]:
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "__init__.py"
    }


def named(page: str) -> set[str]:
    return set(re.findall(r"`([\w./-]+\.(?:py|typed|toml|yaml|md))`", page))


def test_every_file_of_the_package_is_named():
    assert files() - named(PAGE) == set()


def test_every_file_that_is_named_exists():
    for page in (PAGE, CONTRIBUTING):
        assert {name for name in named(page) if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()} == set()


def listed_rooms() -> dict[str, list[set[str]]]:
    """Room -> the names on each of its floors, from the top, as the page says; the whole package is the room ""."""
    rooms: dict[str, dict[int, set[str]]] = {}
    for floor, path in re.findall(r"^\| (\d+) \| `(.*?)` \|", PAGE, flags=re.MULTILINE):
        room, _, name = path.rstrip("/").rpartition("/")
        rooms.setdefault(room, {}).setdefault(int(floor), set()).add(name.removesuffix(".py"))
    return {room: [floors[number] for number in sorted(floors, reverse=True)] for room, floors in rooms.items()}


def checked_rooms() -> dict[str, list[set[str]]]:
    """The same, as the contracts of import-linter say."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = re.findall(r'^containers = \["(.*?)"\]\nlayers = (\[.*?^\])', settings, flags=re.MULTILINE | re.DOTALL)
    return {
        container.removeprefix("lr_callback").lstrip(".").replace(".", "/"): [
            {name.strip() for name in floor.split("|")} for floor in ast.literal_eval(layers)
        ]
        for container, layers in contracts
    }


def test_the_floors_are_those_that_are_checked():
    listed, checked = listed_rooms(), checked_rooms()
    assert {room: floors for room, floors in listed.items() if len(floors) > 1} == checked
    assert len(checked) > 10 and set(listed) == {""} | {
        path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE
    }


def test_names_in_code_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r"`([A-Z_]{4,}|[a-z]+_)`", PAGE):
        assert re.search(rf"\b{name}\b", text), name
