"""The site of ``docs/`` is built whole, names everything public, and shows docstrings as they are meant."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lr_callback as lrc
import lr_callback.metrics.functional
from lr_callback import metrics

pytest.importorskip("mkdocs")
griffe = pytest.importorskip("griffe")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_tools_{name}", DOCS / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(root: Path, folder: Path) -> tuple[int, list[str]]:
    """Build a site as CI does; return the exit status and the warnings."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT, folder) == (0, [])
    return folder


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings = {name: settings[name] for name in ("site_name", "hooks", "validation", "exclude_docs")}
    pages = {
        "README.md": "[fine](docs/A.md) [fine](results/b.md)",
        "CHANGELOG.md": "",
        "docs/A.md": "# A\n\n[one](../gone.md) [two](GONE.md) [three](A.md#gone) [fine](../results/b.md)",
        "results/b.md": "",
        "docs/tools/pages.py": (DOCS / "tools" / "pages.py").read_text(encoding="utf-8"),
        "mkdocs.yml": yaml.safe_dump({**settings, "not_in_nav": "*.md"}),
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    status, warnings = build(tmp_path, tmp_path / "site")
    assert status == 1
    assert [line.partition("a link ")[2].partition(",")[0] for line in warnings] == [
        "'gone.md'",
        "'GONE.md'",
        "'A.md#gone'",
    ]


def pages(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_no_page_fetches_anything_from_elsewhere(site):
    for name, text in pages(site).items():
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(https?:[^\"]*)\"", text)
        assert fetched == [], name


def test_no_role_of_sphinx_is_left_and_links_are_made(site):
    for name, text in pages(site).items():
        assert not re.search(r":(?:attr|class|data|func|meth|mod):", text), name
        assert "<autoref" not in text, name
    assert re.search(r'<a [^>]*href="repair\.html#lr_callback\.Importance\.shrunk"', pages(site)["api/methods.html"])


def test_lists_and_tables_are_such(site):
    # Markdown of Python wants an empty line before them, that of GitHub does not.
    for name, text in pages(site).items():
        assert not re.search(r"<p>(?:(?!</p>).)*\n(?:- |\|)", text, flags=re.DOTALL), name


def test_examples_of_docstrings_are_code(site):
    reference = "".join(text for name, text in pages(site).items() if name.startswith("api/"))
    assert "Example::" not in reference
    assert reference.count('<span class="gp">&gt;&gt;&gt; </span>') > 60


def test_the_programs_are_on_one_page(site):
    page = pages(site)["EXAMPLES.html"]
    for program in (ROOT / "examples").glob("*.py"):
        assert f"{program.name}<a" in page


def test_every_public_name_is_in_the_reference():
    named = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: lr_callback\.(\w+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    assert sorted(named) == sorted(lrc.__all__)


def test_every_metric_is_in_the_reference_as_a_class_and_as_a_function(site):
    page = pages(site)["api/metrics.html"]
    for module in (metrics, metrics.functional):
        for name in module.__all__:  # a function with the name of its file is taken for the file
            assert re.search(rf'id="lr_callback\.metrics\.[\w.]*{name}"', page), name


def test_every_public_name_has_a_docstring():
    for name in lrc.__all__:
        assert inspect.getdoc(getattr(lrc, name)), name


def test_every_page_is_in_the_navigation():
    def entries(nav: object) -> list[str]:
        if isinstance(nav, dict):
            return [one for value in nav.values() for one in entries(value)]
        return [one for value in nav for one in entries(value)] if isinstance(nav, list) else [str(nav)]

    listed = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(listed) == there | {"index.md", "EXAMPLES.md", "CHANGELOG.md"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", ["docstrings", "pages"])
def test_examples_of_the_tools_run(name):
    failed, tried = doctest.testmod(tool(name))
    assert tried and not failed


def test_names_in_docstrings_are_found_from_where_they_stand():
    package = griffe.load("lr_callback", search_paths=[str(ROOT)])
    path = tool("docstrings").full_path
    method = package["decisions.methods.base.Method"]
    assert path(method, "choose") == "lr_callback.decisions.methods.base.Method.choose"
    assert path(method["solve"], "choose") == "lr_callback.decisions.methods.base.Method.choose"
    assert path(method, "Importance.shrunk") == "lr_callback.mathematics.importance.Importance.shrunk"
    assert path(method, "lr_callback.ALDS") == "lr_callback.ALDS"
    assert path(method, "nowhere") == "nowhere"


def test_tables_of_docstrings_are_tables():
    text = "Before:\n\n=====  =======\na      b\n=====  =======\n``F``  one\n``C``  two,\n=====  =======\n\nAfter."
    assert tool("docstrings").to_markdown(text) == (
        "Before:\n\n| a | b |\n| --- | --- |\n| ``F`` | one |\n| ``C`` | two, |\n\nAfter."
    )


def test_sections_of_docstrings_are_those_of_the_reader():
    text = "One.\n\nSource: a paper.\n\nExample::\n\n    >>> 1\n    1"
    assert tool("docstrings").to_markdown(text) == "One.\n\n**Source:** a paper.\n\nExamples:\n    >>> 1\n    1"


def test_links_in_code_are_left_alone():
    text = "[a](../README.md)\n```python\nx[0](../README.md)\n```\n[b](../README.md)\n"
    changed = tool("pages").rewritten(text, "docs/MODELS.md")
    assert changed == "[a](index.md)\n```python\nx[0](../README.md)\n```\n[b](index.md)\n"


def test_what_pages_link_to_comes_along(tmp_path):
    for name, text in {
        "docs/A.md": "[b](../results/b.md) [gone](../gone.md) [c](C.md)",
        "docs/C.md": "",
        "results/b.md": "[d](d.json)",
        "results/d.json": "{}",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert tool("pages").linked_from(tmp_path, ["docs/A.md"]) == ["docs/C.md", "results/b.md", "results/d.json"]
