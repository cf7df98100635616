"""`make bench` ends well: it runs the programs that need nothing, and names the others."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def commands() -> str:
    """Return what `make bench` would do."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def programs(needy: bool) -> list[str]:
    """Return the programs that take an argument which must be given, or those that do not."""
    text = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    own = re.compile(r"required=True|^from accuracy import .*\bparser\b", re.MULTILINE)
    asks = {name for name, source in text.items() if own.search(source)}
    mains = [name for name, source in text.items() if "__main__" in source]
    return [name for name in mains if (name in asks) == needy]


def test_what_needs_nothing_is_run(commands):
    listed = commands.partition("for name in ")[2].partition(";")[0].split()
    assert listed == programs(needy=False)


def test_what_needs_data_is_named(commands):
    told = commands.partition("Left out")[2]
    assert all(name in told for name in programs(needy=True))
