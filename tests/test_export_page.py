"""What ``docs/EXPORT.md`` shows runs, and what it lists is so."""

from __future__ import annotations

import re

import pytest

from lr_callback.commands.export_command import export_parser
from lr_callback.commands.tune_command import tune_parser
from lr_callback.files.formats import FORMATS
from tests.pages import ROOT, run_python

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package)
PAGE = (ROOT / "docs" / "EXPORT.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("any_clock")
def test_python_blocks_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python("docs/EXPORT.md")
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1::4]] == ["onnx", "torch-export", "safetensors"]
    assert {one.name for one in tmp_path.iterdir()} == {"model.onnx", "model.pt2", "model.safetensors", "tuned.pt"}


def test_table_is_that_of_the_formats():
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \| `(.*?)` \|", PAGE, flags=re.MULTILINE)
    expected = [(name, row.suffix, row.reload.format(path="path")) for name, row in FORMATS.items()]
    assert [(name, suffix, line) for name, suffix, line in rows] == [
        (name, suffix, line.partition(" = ")[2] or line) for name, suffix, line in expected
    ]


def test_what_formats_have_a_place_for_is_so():
    told = "ONNX has a place for `None` too, `torch-export` for numbers as well, TorchScript for neither"
    assert told in " ".join(PAGE.split())
    none = {name for name, row in FORMATS.items() if type(None) in row.outputs}
    assert (none, {name for name, row in FORMATS.items() if int in row.outputs}) == (
        {"onnx", "torch-export"},
        {"torch-export"},
    )


def test_options_exist():
    parsers = export_parser(), tune_parser()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"--(?!model\.)\w+", PAGE))
    assert named <= known
