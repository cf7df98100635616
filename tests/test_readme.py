"""What the README shows runs, and what it lists is so."""

from __future__ import annotations

import inspect
import re

from torch import nn

import lr_callback as lrc
from lr_callback.model.find import find_layers
from tests.pages import ROOT, blocks, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8")


def test_it_is_short_and_says_low_rank_first():
    lines = README.splitlines()
    assert "**low-rank**" in lines[0]
    assert len(lines) <= 150


def test_python_blocks_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_python("README.md")
    shown = capsys.readouterr().out
    allocation, restored, trained = names["allocation"], names["fresh"], names["model"]
    assert str(allocation) in shown
    assert allocation.cost <= 0.3 * allocation.dense_cost
    assert str(restored) == str(trained.network)  # the same structure, and the weights of the last epoch:
    assert all((a == b).all() for a, b in zip(restored.parameters(), trained.network.parameters(), strict=True))


def test_the_two_commands_are_those_that_ci_runs():
    [block] = blocks("README.md", "bash")
    shown = block.splitlines()
    assert shown == [
        "pip install -e '.[examples]' && lr-callback fit --config configs/digits.yaml",
        "pip install -e '.[dev]' && pytest",
    ]
    steps = re.findall(r'^run "(.*?)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    first, page, second = steps[:3]
    assert [first, second] == shown
    assert page.startswith("${page:?") and "`a page of this: lr-callback report --checkpoint ...`" in README


def test_arguments_table_is_the_signature():
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, flags=re.MULTILINE)
    parameters = inspect.signature(lrc.LowRankCompression).parameters.values()
    assert rows == [(one.name, repr(one.default)) for one in parameters]


def test_methods_are_all_named():
    classes = [one for one in (getattr(lrc, name) for name in lrc.__all__) if isinstance(one, type)]
    public = [one for one in classes if issubclass(one, lrc.Method)]
    for method in public:
        if method is not lrc.Method:
            assert f"`{method.__name__}`" in README
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", METHOD, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"\w+", row)}
    assert told == set(inspect.signature(lrc.ALDS).parameters)


def test_each_reason_for_leaving_a_layer_out_is_the_one_given():
    rows = re.findall(r"^- `(\w+)(\(.*?\))`: (.*)$", README, flags=re.MULTILINE)
    assert len(rows) == 2
    for name, arguments, reason in rows:
        layer = eval(f"nn.{name}{arguments}", {"nn": nn})
        assert find_layers(nn.Sequential(layer)).skipped["0"] == reason


def test_files_that_it_names_exist():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / "lr_callback" / name).is_file(), name
    for name in re.findall(r"\]\((?!https?:)(.*?)\)", README):
        assert (ROOT / name).exists(), name
