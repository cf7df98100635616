"""The pages of the site: those of ``docs/``, and what they link to besides, where it stands in the repository.

A link in a page is a relative path, as GitHub reads it. On the site ``README.md`` is the first page, ``docs/`` is the
top, and every other file that a page links to comes along under its own path. The programs in ``examples/`` share one
page.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FENCED = re.compile(r"^(```+).*?^\1$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s]+(?=\))")
_EXAMPLES = "EXAMPLES.md"


def links_of(markdown: str) -> list[str]:
    """Return the relative links of a page, without what points into a page.

    Example::

        >>> links_of("[one](a.md#b), [two](https://c.org), [three](#d)")
        ['a.md']
    """
    return [urldefrag(link).url for link in _LINK.findall(_FENCED.sub("", markdown))]


def placed(path: str) -> str:
    """Return where a file of the repository stands on the site.

    Example::

        >>> placed("docs/MODELS.md"), placed("README.md"), placed("examples/trainer.py"), placed("LICENSE")
        ('MODELS.md', 'index.md', 'EXAMPLES.md', 'LICENSE.txt')
    """
    if path == "README.md":
        return "index.md"
    if posixpath.dirname(path) == "examples" or path.rstrip("/") == "examples":
        return _EXAMPLES
    path = path.removeprefix("docs/")
    return path if posixpath.splitext(path)[1] else f"{path}.txt"


def rewritten(markdown: str, source: str) -> str:
    """Return a page whose links are those of the site.

    Args:
        markdown: of the page.
        source: its path in the repository.

    Example::

        >>> rewritten("[text](../README.md#start), [text](api/methods.md)", "docs/MODELS.md")
        '[text](index.md#start), [text](api/methods.md)'
    """
    here = posixpath.dirname(placed(source)) or "."

    def link(match: re.Match[str]) -> str:
        path, mark = urldefrag(match[0])
        target = placed(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        return posixpath.relpath(target, here) + (f"#{mark}" if mark else "")

    return _outside_of_code(markdown, lambda text: _LINK.sub(link, text))


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for fenced in _FENCED.finditer(markdown):
        pieces += [change(markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*pieces, change(markdown[end:])])


def linked_from(root: Path, sources: list[str]) -> list[str]:
    """Return the files of the repository that pages link to, and those that these link to, by their paths."""
    found, waiting = [], list(sources)
    while waiting:
        source = waiting.pop()
        for link in links_of((root / source).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
            if path not in sources and path not in found and (root / path).is_file():
                found.append(path)
                waiting += [path] if path.endswith(".md") else []
    return sorted(found)


def examples_page(programs: dict[str, str]) -> str:
    """Return the page of the examples.

    Args:
        programs: name of the file -> its text.
    """
    lines = ["# Examples\n", "Whole programs. The tests run each of them.\n"]
    for name, text in sorted(programs.items()):
        if name.endswith(".py"):
            what = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            lines += [f"## {name}\n", f"{what}\n"]
        else:
            lines += [f"## {name}\n"]
        lines += [f"``` {name.rpartition('.')[2]}", text.rstrip(), "```\n"]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside of ``docs/``."""
    for file in _added(Path(config.config_file_path).parent, config):
        files.append(file)
    return files


def _added(root: Path, config: MkDocsConfig) -> Iterator[File]:
    docs = [path.relative_to(root).as_posix() for path in Path(config.docs_dir).rglob("*.md")]
    own = ["README.md", "CHANGELOG.md"]
    for path in [*own, *linked_from(root, [*docs, *own])]:
        if not path.startswith(("docs/", "examples/")):
            yield File.generated(config, placed(path), abs_src_path=str(root / path))
    programs = {path.name: path.read_text(encoding="utf-8") for path in (root / "examples").glob("*.*")}
    yield File.generated(config, _EXAMPLES, content=examples_page(programs))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page be those of the site."""
    root = Path(config.config_file_path).parent
    written = page.file.abs_src_path
    return rewritten(markdown, Path(written).relative_to(root).as_posix()) if written else markdown
