"""Hold a wheel and a source distribution to what they must contain: ``python .ci/archives.py FOLDER``."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = {"PKG-INFO", "setup.cfg"}
"""Files of a source distribution that the build writes."""


def tracked() -> set[str]:
    """Return the files of the repository, by their paths in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if name != ".gitignore"}


def same(what: str, found: set[str], wanted: set[str]) -> None:
    """End with what is missing and what is too much, if anything is."""
    if found != wanted:
        sys.exit(f"{what}: missing {sorted(wanted - found)}, too much {sorted(found - wanted)}")
    print(f"{what}: {len(found)} files, all that must be there and no other")


def check_wheel(path: Path, files: set[str]) -> None:
    """Check that a wheel has the package, its licence and one command, and nothing else."""
    with zipfile.ZipFile(path) as archive:
        notes = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
        made = {f"{notes}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
        package = {name for name in files if name.startswith("lr_callback/")}
        assert "lr_callback/py.typed" in package
        same(path.name, set(archive.namelist()), package | made | {f"{notes}/licenses/LICENSE"})
        said = Parser().parsestr(archive.read(f"{notes}/METADATA").decode())
        assert said["License-Expression"] == "Apache-2.0", said["License-Expression"]
        assert said["Version"] == path.name.split("-")[1], said["Version"]
        # An entry point of Lightning's would put the callback into every Trainer.
        entries = archive.read(f"{notes}/entry_points.txt").decode().split()
        assert entries == ["[console_scripts]", "lr-callback", "=", "lr_callback.cli:main"], entries


def check_source(path: Path, files: set[str]) -> None:
    """Check that a source distribution is the repository, and nothing else."""
    with tarfile.open(path) as archive:
        names = {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}
    same(path.name, {name for name in names - MADE if not name.startswith("lr_callback.egg-info/")}, files)


if __name__ == "__main__":
    (wheel,), (source,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    check_wheel(wheel, tracked())
    check_source(source, tracked())
