"""The pictures of ``docs/METHOD.md`` are those that ``docs/pictures`` draws, and show what the package computes."""

from __future__ import annotations

import doctest
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from lr_callback.decisions.candidates import frontier

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
_NUMBER = re.compile(r"-?\d+\.?\d*")


@pytest.fixture
def drawn(monkeypatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__"]
    yield {name: import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def test_the_files_are_what_is_drawn(drawn):
    files = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    assert set(files) == {name for name, module in drawn.items() if hasattr(module, "draw")}
    for name, text in files.items():
        made = drawn[name].draw().svg()
        assert _NUMBER.sub("0", made) == _NUMBER.sub("0", text), "python docs/pictures draws them anew"
        # A last digit may be rounded otherwise by another LAPACK.
        apart = [abs(float(a) - float(b)) for a, b in zip(_NUMBER.findall(made), _NUMBER.findall(text), strict=True)]
        assert max(apart) < 0.15, name


def test_each_is_on_the_page():
    page = (FOLDER.parent / "METHOD.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(pictures/(\w+)\.svg\)", page)) == {path.stem for path in FOLDER.glob("*.svg")}


def test_the_middle_line_is_the_answer(drawn):
    line, known = drawn["line"], drawn["example"].analysis()
    edges = {name: frontier(one) for name, one in known.layers.items()}
    allocation = known.allocate(line._KEEP)
    answer = max(one.relative_error for one in allocation.factorized.values())
    lines = (line._OTHERS[0], answer, line._OTHERS[1])
    costs = {error: sum(edge.costs[line.first_within(edge, error)] for edge in edges.values()) for error in lines}
    high, middle, low = costs.values()
    budget = line._KEEP * known.dense_cost
    assert high < middle <= budget < low
    assert middle <= allocation.cost <= budget, "what is left lowers the next largest error"


def test_examples_run(drawn):
    failed, tried = doctest.testmod(drawn["drawing"])
    assert tried and not failed
