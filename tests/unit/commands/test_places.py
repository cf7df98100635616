"""Where an error comes from: the innermost frame in a user's own code, whatever has wrapped it since."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import lr_callback as lrc
from lr_callback.commands.places import Raised, is_exit, is_refusal, raised_in_own_code, refusal_in, text_of

HERE = Path(__file__)


def line_of(function, offset):
    return function.__code__.co_firstlineno + offset


def raised(run):
    with pytest.raises(Exception) as caught:
        run()
    return caught.value


class Items:
    """A dataset that has no item."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise IndexError(f"no item {index}: of none")


def own():
    raise KeyError("labels")


def in_torch():
    return torch.nn.Linear(2, 3)(torch.zeros(1, 5))


def in_the_standard_library():
    return json.loads("{")


def wrapped():
    try:
        own()
    except KeyError as error:
        exec(compile("raise ValueError('wrapped') from error", "<made>", "exec"), {"error": error})


@pytest.mark.parametrize(
    ("run", "kind", "text", "line"),
    [
        (own, "KeyError", "'labels'", line_of(own, 1)),
        (in_torch, "RuntimeError", "mat1 and mat2 shapes", line_of(in_torch, 1)),
        (in_the_standard_library, "JSONDecodeError", "Expecting property name", line_of(in_the_standard_library, 1)),
    ],
)
def test_the_innermost_frame_of_own_code_is_told(run, kind, text, line):
    found = raised_in_own_code(raised(run))
    assert (found.kind, found.function, found.line) == (kind, run.__name__, line)
    assert found.text.startswith(text) and Path(found.file).name == HERE.name
    assert str(found) == f"{kind}: {found.text} ({found.file}, line {line}, in {run.__name__})"


def test_an_error_that_wraps_another_is_of_the_code_that_raised_the_first():
    error = raised(own)
    outer = ValueError("in other words")
    outer.__cause__ = error
    assert raised_in_own_code(outer) == raised_in_own_code(error)
    assert raised_in_own_code(outer).function == "own"
    assert raised_in_own_code(raised(wrapped)).kind == "ValueError"  # own code is involved in the outer one, too


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_loader_reads_in_another_process_is_told_alike(workers):
    error = raised(lambda: next(iter(DataLoader(Items(), batch_size=2, num_workers=workers))))
    found = raised_in_own_code(error)
    assert (found.kind, found.text, found.function) == ("IndexError", "no item 0: of none", "__getitem__")
    assert found.line == line_of(Items.__getitem__, 1) and Path(found.file).name == HERE.name


def test_a_file_that_is_no_python_is_told_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("fine = 1\nsecond = = 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = raised_in_own_code(raised(lambda: importlib.import_module("broken_module")))
    assert (found.kind, found.file, found.line) == ("SyntaxError", "broken_module.py", 2)


def test_of_an_installed_package_that_is_named_where_no_own_file_is_involved(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" / "others_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("def fail():\n    raise OSError('no data')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    fail = importlib.import_module("others_package").fail
    error = raised(fail)
    assert Path(raised_in_own_code(error).file).name == HERE.name  # this test has called it
    error.__traceback__ = error.__traceback__.tb_next  # the frame of the package, after those of this file
    while error.__traceback__.tb_frame.f_code.co_filename == str(HERE):
        error.__traceback__ = error.__traceback__.tb_next
    assert raised_in_own_code(error) == Raised("OSError", "no data", str(folder / "__init__.py"), 2, "fail")
    del sys.modules["others_package"]


def test_an_error_without_a_traceback_comes_from_nowhere():
    assert raised_in_own_code(ValueError("made up")) is None
    assert not is_refusal(ValueError("made up"))


def test_what_this_package_raises_by_itself_is_a_refusal():
    error = raised(lambda: lrc.allocate(torch.nn.Linear(2, 2), 7.0))
    assert not is_refusal(error)  # this file has called it
    while error.__traceback__.tb_frame.f_code.co_filename == str(HERE):
        error.__traceback__ = error.__traceback__.tb_next
    assert is_refusal(error) and raised_in_own_code(error) is None
    assert refusal_in(error) is error


def test_what_wraps_a_refusal_is_none_and_a_fault_is_none():
    refused = raised(lambda: lrc.allocate(torch.nn.Linear(2, 2), 7.0))
    assert refusal_in(refused) is None  # this file has called it
    refused.__traceback__ = refused.__traceback__.tb_next.tb_next.tb_next
    around = ValueError("around it")
    around.__cause__ = refused
    assert refusal_in(around) is refused
    assert refusal_in(ValueError("made up")) is None
    fault = raised(lambda: lrc.Allocation.from_dict(None))
    fault.__traceback__ = None
    assert refusal_in(fault) is None


def test_a_text_is_one_line_of_a_length_to_be_read():
    assert text_of(ValueError("two\n  lines")) == "two lines"
    assert len(text_of(ValueError("long " * 1000))) == 400


def ends():
    sys.exit("no arguments given")


def test_a_process_that_own_code_ends_is_a_mistake_there_and_any_other_end_is_one():
    with pytest.raises(SystemExit) as stopped:
        ends()
    error = stopped.value
    assert not is_exit(error)
    assert raised_in_own_code(error).text == "no arguments given"
    assert is_exit(SystemExit(0)) and not is_exit(ValueError("made up"))
