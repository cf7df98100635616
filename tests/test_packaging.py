"""What makes the package found, cited and installed: one version everywhere, and the two ways to start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml

import lr_callback

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
REQUIRED = {"cff-version": str, "message": str, "title": str, "authors": list}
"""The keys that a file of CFF 1.2.0 must have."""


def test_version_stands_in_one_place():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in settings
    assert not re.search(r"^version = \"", settings, flags=re.MULTILINE)
    assert version("lr_callback") == lr_callback.__version__


def test_citation_is_of_this_version_and_licence():
    assert CITATION["version"] == lr_callback.__version__
    assert CITATION["license"] == distribution("lr_callback").metadata["License-Expression"]
    assert CITATION["type"] == "software"


def test_citation_has_what_its_format_requires():
    assert {key: type(CITATION.get(key)) for key in REQUIRED} == REQUIRED
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["authors"] == [{"name": "lr_callback maintainers"}]
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert all(author.keys() == {"family-names", "given-names"} for author in reference["authors"])


def test_citation_and_readme_cite_the_same_paper():
    [paper] = CITATION["references"]
    written = dict(re.findall(r"(\w+) = \{(.*?)\}", README))
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    [number] = [one["value"] for one in paper["identifiers"]]
    found = {"title": paper["title"], "author": authors, "booktitle": paper["collection-title"], "note": number}
    found |= {"volume": str(paper["volume"]), "year": str(paper["year"])}
    assert found == written


def test_nothing_is_added_to_every_trainer():
    groups = {entry.group for entry in distribution("lr_callback").entry_points}
    assert groups == {"console_scripts"}


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lr_callback", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_module_is_the_command():
    done = started("--version")
    assert (done.returncode, done.stdout) == (0, f"lr_callback {lr_callback.__version__}\n")
    assert done.stderr == ""


def said_by_python(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_version_is_said_before_anything_that_takes_seconds_is_imported():
    program = """
import sys
from lr_callback.cli import main
try:
    main(["--version"])
except SystemExit as stopped:
    assert stopped.code == 0
assert not {"torch", "lightning", "jsonargparse", "numpy"} & set(sys.modules)
"""
    assert said_by_python(program) == f"lr_callback {lr_callback.__version__}\n"


def test_names_are_imported_on_first_use_and_all_of_them_are_there():
    program = """
import sys
import lr_callback
from lr_callback import __version__
assert "torch" not in sys.modules
assert set(lr_callback.__all__) <= set(dir(lr_callback))
from lr_callback import *
assert [name for name in lr_callback.__all__ if name not in globals()] == []
assert all(globals()[name] is getattr(lr_callback, name) for name in lr_callback.__all__)
print(allocate.__module__, metrics.__name__, lr_callback.layers.__name__)
"""
    assert said_by_python(program) == "lr_callback.analysis.analyze lr_callback.metrics lr_callback.layers\n"


def test_the_names_for_type_checkers_are_those_that_are_imported():
    source = (ROOT / "lr_callback" / "__init__.py").read_text(encoding="utf-8")
    typed = re.findall(r"^    from (lr_callback\S*) import (\w+) as \2$", source, flags=re.MULTILINE)
    assert {name: module for module, name in typed if name != "metrics"} == lr_callback._MODULE_OF
    assert sorted(name for _, name in typed) == sorted(lr_callback.__all__)
    with pytest.raises(AttributeError, match="module 'lr_callback' has no attribute 'alocate'"):
        getattr(lr_callback, "".join(["alo", "cate"]))


def test_a_type_checker_knows_the_public_names_and_no_others(tmp_path):
    lines = ["import lr_callback", "lr_callback.LowRankCompression(0.3)", "lr_callback.layers", "lr_callback.alocate"]
    (tmp_path / "user.py").write_text("\n".join(lines))
    settings = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", ".", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False, timeout=240)
    [told, _] = done.stdout.splitlines()
    assert told == 'user.py:4: error: Module has no attribute "alocate"; maybe "allocate"?  [attr-defined]'
