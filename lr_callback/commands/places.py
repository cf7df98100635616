"""Places: where in a user's own code an error was raised, and whether it is a refusal of this package."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lr_callback.common.table import on_one_line

_HERE = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = ("site-packages", "dist-packages")
_EPOCHS = ("on_advance_start", "advance", "on_advance_end")
"""Functions of Lightning's loop in which the epochs are."""
_FRAMEWORKS = (
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "lr_callback",
    "pytorch_lightning",
    "torch",
    "torchmetrics",
    "yaml",
)
_NOBODY, _PACKAGE, _USER = range(3)
_IN_A_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback")
_ARGUMENT = re.compile(r"`(\w+)((?:=[^`]*)?)`")
_CHECKPOINT = {"source": "--checkpoint"}
_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.MULTILINE)

Frame = tuple[str, int, str]
"""File, line and function."""


@dataclass(frozen=True)
class Raised:
    """An error that a user's own code raised.

    Args:
        kind: name of its type.
        text: of it, on one line.
        file: of the innermost frame in the user's code.
        line: in that file, from 1.
        function: in which that is.

    Example::

        >>> str(Raised("KeyError", "'labels'", "my_data.py", 12, "setup"))
        "KeyError: 'labels' (my_data.py, line 12, in setup)"
    """

    kind: str
    text: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Return it on one line."""
        return f"{self.kind}{': ' * bool(self.text)}{self.text} ({self.place})"

    @property
    def place(self) -> str:
        """Where it was raised."""
        return f"{self.file}, line {self.line}, in {self.function}"


def raised_in_own_code(error: BaseException) -> Raised | None:
    """Return what a user's code raised, whatever has wrapped it since; None if none of that code is involved.

    A user's code is what is neither Python's, nor this package's, nor Lightning's, nor torch's. Code of other packages
    is named where none of the user's own files is involved.

    Args:
        error: with its traceback, and those of its causes.
    """
    chain = list(_chain(error))
    for least in (_USER, _PACKAGE):
        for one in chain:
            own = [frame for frame in _frames(one) if _owner(frame[0]) >= least]
            if own:
                (file, line, function), (kind, text) = own[-1], _told(one)
                return Raised(kind, text, _shown(file), line, function)
    return None


def is_refusal(error: BaseException) -> bool:
    """Return whether this package itself raised an error, not called by a user's code: it says what must hold."""
    frames = _frames(error)
    called = any(_owner(file) == _USER for file, _, _ in frames)
    return bool(frames) and not called and Path(frames[-1][0]).resolve().is_relative_to(_HERE)


def refusal_in(error: BaseException) -> BaseException | None:
    """Return what this package or Lightning has refused on purpose, whatever has wrapped it since.

    None if a user's code is involved, or something else is the matter: what Python or torch raise inside of this
    package is a fault of its own, and no answer to a user.
    """
    own = raised_in_own_code(error)
    return next((one for one in _chain(error) if own is None and _is_on_purpose(one)), None)


def _is_on_purpose(error: BaseException) -> bool:
    if isinstance(error, MisconfigurationException):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return is_refusal(error) and any((one.line or "").startswith("raise ") for one in last)


def is_in_training(error: BaseException) -> bool:
    """Return whether an error was raised when a training was under way.

    What the callback refuses at the end of the first batch, on which it counts, is not: no more than that is lost.
    """
    frames = [(Path(file).name, name) for file, _, name in _frames(error)]
    return ("callback.py", "on_train_batch_end") not in frames and any(
        file == "fit_loop.py" and name in _EPOCHS for file, name in frames
    )


def is_of_log_folder(error: BaseException) -> bool:
    """Return whether an error is that a logger or a checkpoint of Lightning found no place for its files."""
    files = [Path(file) for file, _, _ in _frames(error)]
    writers = [one for one in files if "loggers" in one.parts or one.name == "model_checkpoint.py"]
    return isinstance(error, OSError) and any(set(one.parts) & {"lightning", "pytorch_lightning"} for one in writers)


def is_exit(error: BaseException) -> bool:
    """Return whether a process is to end, and not because a user's code says so: as its help is shown."""
    return isinstance(error, SystemExit) and raised_in_own_code(error) is None


def text_of(error: BaseException) -> str:
    """Return the text of an error on one line, cut off where it is long."""
    return on_one_line(reworded(error))


def reworded(error: BaseException, names: Mapping[str, str] = _CHECKPOINT) -> str:
    """Return the text of an error in the words of a command line, which has a checkpoint for a source.

    Args:
        error: whose text names arguments of functions, in backticks.
        names: of those -> what they are called on the command line; others stay as they are.

    Example::

        >>> reworded(ValueError("`source`: must be a file; pass `strict=False`"))
        '--checkpoint: must be a file; pass `strict=False`'
    """
    return _ARGUMENT.sub(lambda found: f"{names[found[1]]}{found[2]}" if found[1] in names else found[0], str(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _frames(error: BaseException) -> list[Frame]:
    """Return the frames of an error, the innermost last; also those in the process where a DataLoader read."""
    frames = [(one.filename, one.lineno or 0, one.name) for one in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0, "<module>"))
    if _IN_A_WORKER.match(str(error)):
        frames += [(file, int(line), function) for file, line, function in _FRAME.findall(str(error))]
    return frames


def _told(error: BaseException) -> tuple[str, str]:
    """Return type and text of an error; of one in a process where a DataLoader read, those of there."""
    found = _IN_A_WORKER.match(str(error))
    if found is None:
        return type(error).__name__, text_of(error)
    _, mark, text = str(error).rpartition(f"{found[1]}: ")
    return found[1], on_one_line(text) if mark else ""


def _owner(file: str) -> int:
    """Return whose a file is."""
    path = Path(file).resolve()
    if not path.is_file() or path.is_relative_to(_HERE):
        return _NOBODY
    inside = [path.parts[index + 1] for index, part in enumerate(path.parts[:-1]) if part in _INSTALLED]
    if inside:
        return _NOBODY if inside[-1] in _FRAMEWORKS else _PACKAGE
    return _NOBODY if path.is_relative_to(_STANDARD_LIBRARY) else _USER


def _shown(file: str) -> str:
    here = Path.cwd()
    return str(Path(file).relative_to(here)) if Path(file).is_relative_to(here) else file
