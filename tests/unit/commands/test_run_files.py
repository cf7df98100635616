"""What the files of a run say of its model and data, each read once."""

from pathlib import Path

import pytest
import torch
import yaml

import lr_callback as lrc
from lr_callback.commands.run_files import RunFiles

MODEL = {"class_path": "my.Model", "init_args": {"width": 3}}
HYPERPARAMETERS = {"width": 5, "_class_path": "my.Saved"}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": HYPERPARAMETERS}, folder / "last.ckpt")
    return folder / "last.ckpt"


def configured(checkpoint, written):
    path = checkpoint.parents[1] / "config.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    return path


def test_a_model_is_what_the_checkpoint_says_else_what_the_configuration_does(checkpoint):
    configured(checkpoint, {"model": MODEL, "data": {"samples": 4}})
    files = RunFiles(checkpoint)
    assert files.described() == {"model": {"class_path": "my.Saved", "init_args": {"width": 5}}}
    assert files.described(data="my.Data")["data"] == {"class_path": "my.Data", "init_args": {"samples": 4}}
    assert RunFiles(checkpoint, str(checkpoint.parents[1] / "config.yaml")).described() == {"model": MODEL}


def test_each_file_is_read_once(checkpoint):
    path = configured(checkpoint, {"model": MODEL})
    files = RunFiles(checkpoint)
    before = files.loaded, files.configuration, files.described()
    checkpoint.unlink()
    path.unlink()
    assert (files.loaded, files.configuration, files.described()) == before


def test_why_a_model_is_not_known(checkpoint):
    assert RunFiles(checkpoint).why_unknown().startswith("last.ckpt does not say how its model is made, and there is")
    configured(checkpoint, {"model": {"width": 3}})
    assert "has the arguments of its model, and not the class" in RunFiles(checkpoint).why_unknown()


def test_what_is_no_file_of_a_run_is_refused(tmp_path):
    plan = tmp_path / "plan.json"
    lrc.allocate(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.5).to_json(plan)
    with pytest.raises(ValueError, match=r"plan\.json: must be a file with weights, found an allocation"):
        _ = RunFiles(plan).loaded
    with pytest.raises(FileNotFoundError, match=r"--config gone\.yaml: no such file"):
        _ = RunFiles(Path("last.ckpt"), "gone.yaml").configuration


@pytest.mark.parametrize(
    "text", [b"model: {class_path: my.Model\n  data: [\n", b"\xff\xfe", b"model: !!python/name:os.system"]
)
def test_a_configuration_that_cannot_be_read_is_refused_by_its_name(checkpoint, text):
    path = checkpoint.parents[1] / "config.yaml"
    path.write_bytes(text)
    for files in (RunFiles(checkpoint), RunFiles(checkpoint, str(path))):
        with pytest.raises(ValueError, match=r"config\.yaml: must be YAML, plain text in UTF-8, found .* by --config"):
            _ = files.configuration


def test_a_configuration_that_is_named_must_hold_arguments(checkpoint):
    path = configured(checkpoint, ["model"])
    assert RunFiles(checkpoint).configuration == {}  # some other file of that name
    with pytest.raises(ValueError, match=r"config\.yaml: must hold names and values, .* found list; give the config"):
        _ = RunFiles(checkpoint, str(path)).configuration


@pytest.mark.parametrize("saved", [[1, 2], "width", {1: 2}, {"width": 5, "_class_path": 7}, None])
def test_hyperparameters_of_any_kind_leave_what_the_configuration_says(checkpoint, saved):
    configured(checkpoint, {"model": MODEL, "data": {"class_path": 3}})
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": saved}, checkpoint)
    assert RunFiles(checkpoint).described() == {"model": MODEL}
