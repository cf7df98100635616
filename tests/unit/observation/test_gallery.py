"""Gallery: what loggers can take of arguments, numbers and long tables."""

import torch
from torch import nn

import lr_callback as lrc
from lr_callback.observation.boards import board_of
from lr_callback.observation.gallery import MOST_NUMBERED, layer_numbers, readable_arguments


def test_arguments_are_numbers_and_text_and_never_long():
    found = readable_arguments({"self": 1, "__class__": 2, "method": lrc.ALDS(), "include": ["x" * 1000], "ramp": True})
    assert list(found) == ["method", "include", "ramp"] and found["ramp"] is True
    assert str(found["method"]).startswith("ALDS(") and len(str(found["include"])) == 300


def test_numbers_are_of_the_largest_layers_dense_ones_with_all_kept():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8 + index, 16) for index in range(MOST_NUMBERED + 5)])
    analysis = lrc.analyze(model, method=lrc.ALDS(slices=[1]))
    allocation = analysis.allocate(1.0)
    numbers = layer_numbers(allocation, analysis.curves(allocation))
    assert len(numbers) == 2 * MOST_NUMBERED and "compression/layers/4/kept" not in numbers
    assert numbers["compression/layers/24/kept"] == 1.0 and numbers["compression/layers/24/error"] == 0.0


def test_numbers_of_a_compiled_network_have_the_names_of_its_layers():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(32, 32))))
    analysis = lrc.analyze(model, method=lrc.ALDS(slices=[1]))
    allocation = analysis.allocate(0.5)
    numbers = layer_numbers(allocation, analysis.curves(allocation))
    assert list(numbers) == ["compression/layers/0.0/kept", "compression/layers/0.0/error"]


def test_numbers_have_names_that_any_file_takes():
    model = nn.Module()
    model.add_module("größe\n层", nn.Linear(32, 32))
    analysis = lrc.analyze(model, method=lrc.ALDS(slices=[1]))
    allocation = analysis.allocate(0.5)
    numbers = layer_numbers(allocation, analysis.curves(allocation))
    assert list(numbers) == [rf"compression/layers/gr\xf6\xdfe\n\u5c42/{what}" for what in ("kept", "error")]


def test_what_answers_to_every_name_takes_no_figures():
    class Everything:
        def __getattr__(self, name):
            return lambda *_, **__: None

    class Logger:
        experiment = Everything()

    assert board_of(Logger()) is None
