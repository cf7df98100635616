"""What is said of wrong command lines: of a real parser, so that its own words are those that are matched."""

import sys
from types import ModuleType
from typing import Any, Literal

import pytest
from torch import nn

from lr_callback.commands.answers import Parser, option_names
from lr_callback.commands.wording import plain
from lr_callback.decisions.methods import Method
from lr_callback.recipes import ImageClassifier


@pytest.fixture
def parser():
    """Return a parser with an argument of each type."""
    made = Parser(prog="program")
    made.add_argument("--config", action="config")
    made.add_subclass_arguments(nn.Module, "model", required=False)
    made.add_subclass_arguments(Method, "method", required=False)
    made.add_argument("--keep_ratio", type=float, default=0.5)
    made.add_argument("--include", type=list[str] | None)
    made.add_argument("--seeds", type=list[int], default=[0])
    made.add_argument("--overrides", type=dict[str, Any] | None)
    made.add_argument("--quiet", type=bool, default=False)
    made.add_argument("--refit", type=Literal["cut", "dense"] | None)
    made.add_argument("--epochs", type=int, default=0)
    return made


LINEAR = ["--model", "torch.nn.Linear"]
RESNET = ["--model", "lr_callback.recipes.CifarResNet"]
IMAGES = ["--model", f"{ImageClassifier.__module__}.ImageClassifier"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--epochs", "many"], "--epochs must be a whole number, got many."),
        (["--epoch", "3"], "--epoch: there is no such argument; did you mean --epochs?"),
        (["--keep-ratio", "0.5"], "--keep-ratio: there is no such argument; did you mean --keep_ratio?"),
        (["--keep-ratio=0.5"], "--keep-ratio: there is no such argument; did you mean --keep_ratio?"),
        (["--zzz", "3"], "--zzz: there is no such argument."),
        (["more"], "more: each value must follow the name of its argument, as --name value, found none before it."),
        (["--keep_ratio", "much"], "--keep_ratio must be a number, got much."),
        (["--quiet", "maybe"], "--quiet must be true or false, got maybe."),
        (["--refit", "x"], "--refit must be one of 'cut', 'dense', got x."),
        (["--include", "layer1.*"], """--include must be a list, as '["layer1.*"]', got layer1.*."""),
        (["--include", "a"], """--include must be a list, as '["a"]', got a."""),
        (["--seeds", "1"], "--seeds must be a list, as '[1]', got 1."),
        (["--overrides", "conv1"], "--overrides must be names and values, as '{name: value}', got conv1."),
        (["--model", "NoNet"],
         "--model must name a class by the path that it is imported by, as my_module.MyClass, got NoNet."),
        (["--model", "gone.Net"],
         "--model gone.Net: no module 'gone' is found from here; name the class by the path that your program "
         "imports it by, in the folder in which it does."),
        (["--model", "torch.nn.Linaer"], "--model torch.nn.Linaer: must be there, found no Linaer in torch.nn; did you "
         "mean Linear?"),
        (["--model", "lr_callback.ALDS"], "--model must name a Module, found lr_callback.ALDS, which is another class; "
         "name one."),
        (LINEAR,
         "--model torch.nn.Linear: must be given its arguments --model.in_features, --model.out_features, got none."),
        ([*RESNET, "--model.depth", "deep"], "--model.depth must be a whole number, got deep."),
        ([*RESNET, "--model.dept", "8"],
         "--model.dept: lr_callback.recipes.CifarResNet has no such argument; did you mean "
         "--model.depth?"),
        ([*IMAGES, "--model.network", "no.Such"],
         "--model.network no.Such: no module 'no' is found from here; name the "
         "class by the path that your program imports it by, in the folder in which it does."),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_told_in_plain_words(parser, capsys, arguments, text):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {text}"


def test_a_name_that_several_classes_have_is_told_with_their_paths(parser, capsys, monkeypatch):
    for name in ("one_place", "other_place"):
        module = ModuleType(name)
        module.InTwo = type("InTwo", (nn.Module,), {"__module__": name})
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "InTwo"])
    told = (
        "error: --model must name one class, got InTwo, which several are called: one_place.InTwo, other_place.InTwo; "
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"{told}name its path."


def test_a_class_whose_imports_are_missing(parser, capsys, tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "needs_more.Net"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "what it imports must be installed, found no module 'not_installed_here'; install it" in told


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("epoch: 3\n", "error: epoch: a configuration has no such argument; did you mean --epochs?"),
        ("epochs: many\n", "error: --epochs must be a whole number, got many."),
    ],
)
def test_a_wrong_configuration_is_told_in_plain_words(parser, capsys, tmp_path, content, text):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(tmp_path / "a.yaml")])
    assert capsys.readouterr().err.splitlines()[-1] == text


def test_a_configuration_that_is_not_there(parser, capsys, tmp_path):
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(tmp_path / "no.yaml")])
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --config {tmp_path / 'no.yaml'}: no such file."


def test_an_unknown_text_is_given_whole_on_one_line():
    assert plain('Parser key "a":\n  Something\n  new', []) == "--a: Something new"
    assert plain("Something\nelse", []) == "Something else"


def test_a_refusal_names_the_arguments_of_the_command_line(parser, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.refuse(ValueError("`keep_ratio`=2 and `epochs`\nmust be less than `forward`; pass `quiet=True`."))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: --keep_ratio=2 and --epochs must be less than `forward`; pass --quiet=True.\n"
    )


def test_names_of_groups_are_those_that_only_one_argument_ends_in():
    made = Parser(prog="program")
    for name in ("one.epochs", "two.epochs", "one.keep_ratio", "output"):
        made.add_argument(f"--{name}", type=int)
    named = option_names(made)
    assert named["keep_ratio"] == "--one.keep_ratio" and named["path"] == "--output"
    assert "epochs" not in named and "source" not in named
