"""The table of formats, and what writing leaves behind."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lr_callback.common.example import Example
from lr_callback.files.exporting import export
from lr_callback.files.formats import FORMATS, Order, check_format, exported_program


def test_suffixes_tell_formats_apart():
    assert {check_format(None, Path(f"model{row.suffix}")) for row in FORMATS.values()} == set(FORMATS)


@pytest.mark.parametrize("name", ["onnx", "torchscript", "safetensors"])
def test_a_named_format_does_not_ask_for_its_suffix(name):
    assert check_format(name, Path("model.bin")) == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".bin", *(row.suffix for row in FORMATS.values())])
def test_what_a_reader_takes_for_another_format_is_refused_before_anything_is_made(name, suffix, tmp_path):
    if suffix == FORMATS[name].suffix or (suffix == ".bin" and name != "torch-export"):
        assert check_format(name, Path(f"model{suffix}")) == name
        return
    with pytest.raises(ValueError, match=rf"a file of the format {name} must end in \{FORMATS[name].suffix}, found"):
        export(Never(), tmp_path / f"model{suffix}", format=name, example_input=torch.ones(1, 1))
    assert not list(tmp_path.iterdir())


class Never(nn.Module):
    def forward(self, features):
        raise AssertionError("called")


def test_program_keeps_no_example_and_takes_any_number_of_rows():
    order = Order(nn.Linear(3, 2).eval(), Example((torch.ones(1, 3),)), True, {})
    program = exported_program(order)
    assert program.example_inputs is None
    assert program.module()(torch.ones(7, 3)).shape == (7, 2)
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs)


def test_lightning_module_without_a_trainer_is_traced_and_asks_for_one_again(tmp_path):
    module = Plain().eval()
    FORMATS["torchscript"].write(
        Order(module, Example(named={"inputs": torch.ones(1, 3)}), True, {}), tmp_path / "m.ts"
    )
    assert torch.equal(
        FORMATS["torchscript"].open(tmp_path / "m.ts")(Example((torch.ones(5, 3),))), module(torch.ones(5, 3))
    )
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        assert module.trainer
