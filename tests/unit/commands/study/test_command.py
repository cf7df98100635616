"""The configurations of studies that are in the repository."""

from pathlib import Path

import pytest

import lr_callback as lrc
from lr_callback.commands.study.command import study_parser

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


# Calls of names that newer versions of jsonargparse deprecate.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("name", ["study_digits.yaml", "study_cifar10.yaml"])
def test_configurations_name_all_methods_of_the_paper(name):
    chosen = study_parser().parse_args(["--config", str(CONFIGS / name)])
    public = {
        one
        for one in (getattr(lrc, name) for name in lrc.__all__)
        if isinstance(one, type) and issubclass(one, lrc.Method)
    } - {lrc.Method}
    named = {one.method.class_path for one in chosen.methods.values() if one.method is not None}
    assert {path.rpartition(".")[2] for path in named} == {one.__name__ for one in public}
    assert any(one.filter_pruning for one in chosen.methods.values())
