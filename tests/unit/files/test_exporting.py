"""Export: the file gives the model's outputs and holds its factors, or there is no file and nothing has changed."""

import os
import re
import sys
from collections import namedtuple

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.common.example import Example, largest_difference
from lr_callback.files.formats import FORMATS, check_format
from lr_callback.files.safetensors_file import read_safetensors

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package)

NEEDS_EXAMPLE = [name for name, row in FORMATS.items() if row.open is not None]


def network(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 64), nn.Dropout(), nn.Linear(64, 10))
        model[1].running_mean.normal_()
        return model.to(**options)


def cut(model, keep_ratio=0.4, **options):
    lrc.factorize_(model, lrc.allocate(model, keep_ratio, **options))
    return model


def images(rows=2, **options):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(**options)


def run(path, inputs):
    """Return the outputs of a file, read by the one line that is promised."""
    row = FORMATS[check_format(None, path)]
    return row.open(path)(Example.of(inputs))


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs)


@pytest.fixture(params=NEEDS_EXAMPLE)
def format(request):
    return request.param


@pytest.fixture
def file(tmp_path, format):
    return tmp_path / f"model{FORMATS[format].suffix}"


@pytest.mark.situation("Out of the door", "a file for any number of rows, made from one", "works")
def test_file_gives_the_outputs_for_any_number_of_rows(format, file):
    model = cut(network())
    done = lrc.export(model, file, example_input=images(1))
    assert (done.format, done.path, done.file_bytes) == (format, file, file.stat().st_size)
    assert done.difference < 1e-5
    for rows in (1, 3):
        assert largest_difference(outputs(model, images(rows)), run(file, images(rows))) < 1e-4


def test_model_is_given_back_as_it_was(file):
    model = cut(network()).train()
    model[1].eval()
    modes = [one.training for one in model.modules()]
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    lrc.export(model, file, example_input=images())
    assert [one.training for one in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_fixed_number_of_rows(file, format):
    lrc.export(cut(network()), file, example_input=images(2), dynamic_batch=False)
    if format != "torchscript":  # a traced graph does not look
        with pytest.raises(Exception, match=r"2|shape|dimension"):
            run(file, images(3))
    run(file, images(2))


def test_file_holds_neither_the_example_nor_paths_of_this_machine(tmp_path):
    secret = torch.full((2, 3, 8, 8), 1234.5)
    for name in ("model.pt2", "model.onnx"):
        lrc.export(cut(network()), tmp_path / name, example_input=secret)
        written = (tmp_path / name).read_bytes()
        assert secret[0, 0, 0].numpy().tobytes() not in written
        assert os.path.dirname(torch.__file__).encode() not in written
        assert os.path.dirname(__file__).encode() not in written


def test_onnx_has_a_named_batch_and_every_factor_once(tmp_path):
    import onnx

    model = cut(network(), method=lrc.ALDS(max_slices=4))
    slices = [
        one.num_slices for one in model.modules() if isinstance(one, (lrc.FactorizedConv2d, lrc.FactorizedLinear))
    ]
    assert max(slices) > 1
    lrc.export(model, tmp_path / "model.onnx", example_input=images())
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        8,
        8,
    ]
    held = sum(torch.Size(one.dims).numel() for one in graph.initializer)
    norms = sum(one.numel() for one in model[1].parameters())  # folded into the convolution before
    assert (
        sum(one.numel() for one in model.parameters()) - norms
        <= held
        < sum(one.numel() for one in model.parameters()) + 50
    )


BAKED = {
    "a number in the code": lambda images: images.reshape(2, 3, 64),
    "read from the example": lambda images: images.reshape(int(images.shape[0]), -1),
}


class Function(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of, self.scale = of, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.of(images) * self.scale


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("of", BAKED.values(), ids=BAKED)
@pytest.mark.situation("Out of the door", "any number of rows asked of a model with a fixed one", "refused")
def test_a_fixed_number_of_rows_in_the_model_is_refused(file, of):
    with pytest.raises(ValueError, match=r"`dynamic_batch=False`.*Nothing was written"):
        lrc.export(Function(of), file, example_input=images(2))
    assert list(file.parent.iterdir()) == []
    lrc.export(Function(of), file, example_input=images(2), dynamic_batch=False)


def test_file_with_other_outputs_is_refused_and_the_former_one_stays(file):
    file.write_text("former")
    with pytest.raises(ValueError, match=r"the file must give the outputs of the model within .*, found .*Nothing was"):
        lrc.export(Function(lambda images: images + torch.rand(())), file, example_input=images(2))
    assert file.read_text() == "former"
    assert list(file.parent.iterdir()) == [file]


def test_what_torch_cannot_follow_is_refused(tmp_path):
    def branching(images):
        return images if images.sum() > 0 else -images

    for name in ("model.pt2", "model.onnx"):
        with pytest.raises(ValueError, match=r"torch.export must be able to follow Function.forward .*Nothing was"):
            lrc.export(Function(branching), tmp_path / name, example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_the_former_file(tmp_path):
    class Interrupted(nn.Module):
        def forward(self, images):
            raise KeyboardInterrupt

    file = tmp_path / "model.pt2"
    file.write_text("former")
    with pytest.raises(KeyboardInterrupt):
        lrc.export(Interrupted(), file, example_input=images())
    assert file.read_text() == "former"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("model.bin", {}, ValueError, r"`format` must be one of torch-export \(.pt2\), onnx .*got the suffix '.bin'"),
        ("model.bin", {"format": "tflite"}, ValueError, r"`format` must be one of .*safetensors.*got 'tflite'"),
        ("none/model.pt2", {}, FileNotFoundError, "its folder must exist"),
        ("", {"format": "onnx"}, IsADirectoryError, "must name a file, found a folder"),
        ("model.pt2", {"example_input": None}, ValueError, "`example_input`: the format torch-export .* got none"),
        ("model.pt2", {"example_input": "text"}, ValueError, "`example_input` must be a tensor, .* got str"),
        ("model.pt2", {"example_input": (torch.ones(2, 3), torch.ones(3))}, ValueError, r"same number of rows.*\(3,\)"),
        ("model.pt2", {"example_input": torch.ones(2, 5)}, ValueError, r"Sequential must take it, .*\(2, 5\) make a R"),
        ("model.pt2", {"example_input": torch.ones(0, 3)}, ValueError, r"at least one, .*\(0, 3\)"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, name, options, error, text):
    with pytest.raises(error, match=text):
        lrc.export(network(), tmp_path / name, **{"example_input": images(), **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.situation("Bad input", "a model on the meta device, exported", "refused")
@pytest.mark.parametrize("suffix", [row.suffix for row in FORMATS.values()])
def test_a_model_without_values_is_refused(tmp_path, suffix):
    model = network()
    model[-1].to("meta")
    message = r"`model`: its weights must be on a device that holds values, found 2 on the meta device, the first is "
    with pytest.raises(ValueError, match=message + r"\w+\.weight; load its weights first\. Nothing was written"):
        lrc.export(model, tmp_path / f"model{suffix}", example_input=images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "name"), [("onnxscript", "model.onnx"), ("safetensors", "model.safetensors")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=rf"found no {package}; .*pip install 'lr_callback\[export\]'"):
        lrc.export(network(), tmp_path / name, example_input=images())
    assert list(tmp_path.iterdir()) == []


def test_onnx_above_its_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lr_callback.files.formats.ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"must stay below 1,000 bytes, found weights of .*torch-export"):
        lrc.export(network(), tmp_path / "model.onnx", example_input=images())


def test_safetensors_needs_no_example_and_holds_the_allocation(tmp_path):
    from safetensors import safe_open

    model, file = network(), tmp_path / "model.safetensors"
    allocation = lrc.allocate(model, 0.4)
    lrc.factorize_(model, allocation)
    lrc.export(model, file, allocation=allocation)
    with safe_open(file, "pt") as opened:
        assert lrc.Allocation.from_json(opened.metadata()["allocation"]) == allocation
    fresh = network(seed=5)
    lrc.restore_(fresh, file)
    assert torch.equal(outputs(fresh, images()), outputs(model, images()))


def test_allocation_of_another_model_is_refused(tmp_path):
    model = network()
    allocation = lrc.allocate(model, 0.4)
    with pytest.raises(
        ValueError, match=r"`allocation` must be that of .* they differ at 3: 3 has .* None in the model"
    ):
        lrc.export(model, tmp_path / "model.safetensors", allocation=allocation)
    assert list(tmp_path.iterdir()) == []


def test_printed_it_is_a_table_and_the_line_that_reads_the_file(tmp_path):
    model, file = cut(network()), tmp_path / "model.safetensors"
    done = lrc.export(model, file)
    dense, held = (sum(one.nbytes for one in each.state_dict().values()) for each in (network(), model))
    assert (done.dense_weight_bytes, done.weight_bytes, done.saved_bytes) == (dense, held, dense - held)
    assert done.file_bytes == file.stat().st_size
    header, row, shown, line = str(done).splitlines()
    assert row.split() == ["safetensors", f"{dense:,}", f"{held:,}", f"{done.file_bytes:,}", "0.0e+00"]
    told = ["format", "dense weight bytes", "weight bytes", "file bytes", "largest difference"]
    assert re.split(" {2,}", header) == told and shown == str(file)
    assert max(map(len, (header, row))) <= 80
    fresh = network(seed=5)
    exec(line.removeprefix("read it with: "), {"lr_callback": lrc, "model": fresh})
    assert torch.equal(fresh.state_dict()["3.encoder.weight"], read_safetensors(file)["3.encoder.weight"])


def test_compiled_model_is_exported_under_the_names_of_the_model(tmp_path):
    model = cut(network())
    lrc.export(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    lrc.export(torch.compile(model, backend="eager"), tmp_path / "model.pt2", example_input=images())
    assert read_safetensors(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.allclose(run(tmp_path / "model.pt2", images(5)), outputs(model, images(5)), atol=1e-6)


class Giving(nn.Module):
    """A model that gives something around its layer's outputs."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(16, 16), wrap

    def forward(self, features):
        return self.wrap(self.layer(features))


@pytest.mark.situation("Out of the door", "outputs that a file of the format cannot give", "refused")
@pytest.mark.parametrize(
    ("wrap", "refused", "found"),
    [
        (lambda outputs: {"features": outputs, "count": 3}, ("onnx", "ts"), r"found int at \['count'\]"),
        (lambda outputs: (outputs, [outputs.shape[0], 1.5]), ("onnx", "ts"), r"found int at \[1\]\[0\], float at "),
        (lambda outputs: {"features": outputs, "none": None}, ("ts",), r"found NoneType at \['none'\]"),
        (lambda outputs: (outputs, "text"), ("pt2", "onnx", "ts"), r"found str at \[1\]"),
        (lambda outputs: 3, ("onnx", "ts"), r"found int\."),
        (lambda outputs: [1.0, None], ("pt2",), r"found no tensor\."),
    ],
)
def test_outputs_that_the_format_has_no_place_for_are_named(tmp_path, wrap, refused, found):
    for suffix in refused:
        with pytest.raises(ValueError, match=rf"the outputs of the model must be .*{found}.*Nothing was written"):
            lrc.export(Giving(wrap), tmp_path / f"model.{suffix}", example_input=torch.randn(2, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "beside"), [("onnx", None), ("pt2", None), ("pt2", 3), ("pt2", 1.5), ("pt2", True)])
def test_outputs_beside_tensors_are_given_where_the_format_has_a_place(tmp_path, suffix, beside):
    model = Giving(lambda outputs: {"features": outputs, "beside": beside})
    done = lrc.export(model, tmp_path / f"model.{suffix}", example_input=torch.randn(2, 16))
    assert done.difference < 1e-5


def test_an_output_class_that_torch_cannot_write_is_refused(tmp_path):
    pair = namedtuple("pair", "one two")
    with pytest.raises(ValueError, match=r"torch.export.save must .*_register_namedtuple.*Nothing was written"):
        lrc.export(Giving(lambda outputs: pair(outputs, outputs)), tmp_path / "a.pt2", example_input=torch.randn(2, 16))
    assert not list(tmp_path.iterdir())


class Stepping(nn.Module):
    """Gives what depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features):
        self.calls += 1
        return self.layer(features) * self.calls


@pytest.mark.situation("Out of the door", "a model that counts its calls in a buffer", "works")
@pytest.mark.parametrize("suffix", ["pt2", "ts"])
def test_file_begins_where_a_model_that_counts_its_calls_does(tmp_path, suffix):
    model, file = Stepping(), tmp_path / f"model.{suffix}"
    lrc.export(model, file, example_input=torch.randn(2, 16))
    assert model.calls == 0
    inputs = torch.randn(3, 16)
    assert largest_difference(outputs(model, inputs), run(file, inputs)) < 1e-5
