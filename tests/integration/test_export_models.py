"""Real networks out of the door: same outputs, and smaller by what the table of the allocation says."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import lr_callback as lrc
from lr_callback.common.example import Example, largest_difference
from lr_callback.files.formats import FORMATS

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package)
pytestmark = pytest.mark.usefixtures("one_thread")

OVERHEAD = {"torch-export": 8000, "onnx": 2000, "torchscript": 3500, "safetensors": 500}
"""Format -> bytes that the graph and the names of one factorized layer may take more than a dense one's, at most."""


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS = {
    "resnet18": (resnet18, torch.Size([2, 3, 32, 32])),
    "encoder": (encoder, torch.Size([3, 5, 32])),
}


@pytest.fixture(scope="module", params=NETWORKS)
def networks(request):
    """Return a dense network, its factorized form, the allocation between them and an input."""
    make, shape = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense, inputs = make(), torch.randn(shape)
    model = copy.deepcopy(dense)
    allocation = lrc.allocate(model, 0.6)
    lrc.factorize_(model, allocation)
    return dense, model, allocation, inputs


# A traced graph holds what it finds in the example, as torch says here of nn.MultiheadAttention.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.situation("Out of the door", "resnet18 and a transformer encoder in all formats", "works")
def test_same_outputs_and_smaller_by_what_the_table_said(networks, format, tmp_path):
    dense, model, allocation, inputs = networks
    suffix = FORMATS[format].suffix
    cut = lrc.export(model, tmp_path / f"cut{suffix}", example_input=inputs)
    full = lrc.export(dense, tmp_path / f"dense{suffix}", example_input=inputs)
    assert cut.saved_bytes == 4 * (allocation.dense_cost - allocation.cost) > 0
    assert full.saved_bytes == 0
    more = cut.file_bytes + cut.saved_bytes - full.file_bytes
    assert abs(more) <= OVERHEAD[format] * len(allocation.factorized)
    others = torch.randn(5, *inputs.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert largest_difference(copy.deepcopy(model).eval()(others), reloaded(dense, cut, others)) < 1e-4


def reloaded(dense, written, inputs):
    """Return the outputs of a file, read as its row says."""
    opener = FORMATS[written.format].open
    if opener is not None:
        return opener(written.path)(Example.of(inputs))
    fresh = copy.deepcopy(dense).eval()
    lrc.restore_(fresh, written.path)
    return fresh(inputs)


class Pair(nn.Module):
    """Two inputs and several outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, left, right, scale=1.0):
        return {"sum": self.left(left) + self.right(right) * scale, "parts": (left.argmax(1), self.left(right))}


def linear(**options):
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(**options)


def convolution(**options):
    layers = [nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 36, 16)).to(**options)


LAST = {"memory_format": torch.channels_last}
PAIR = {"right": torch.randn(2, 64), "left": torch.randn(2, 64), "scale": 2.0}
OTHERS = {
    "bfloat16": (linear(dtype=torch.bfloat16), torch.randn(2, 64).bfloat16(), {"onnx"}),
    "float16": (linear(dtype=torch.float16), torch.randn(2, 64).half(), set()),
    "float64": (linear(dtype=torch.float64), torch.randn(2, 64).double(), set()),
    "float64 convolutions": (convolution(dtype=torch.float64), torch.randn(2, 8, 8, 8).double(), {"onnx"}),
    "channels_last": (convolution(**LAST), torch.randn(2, 8, 8, 8).to(**LAST), set()),
    "two inputs": (Pair(), (PAIR["left"], PAIR["right"]), {"torchscript"}),
    "named inputs, one of them a number": (Pair(), PAIR, {"torchscript"}),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", OTHERS)
def test_other_dtypes_layouts_and_signatures(case, format, tmp_path):
    model, inputs, refused_by = OTHERS[case]
    model = copy.deepcopy(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    file = tmp_path / f"model{FORMATS[format].suffix}"
    if format in refused_by:
        with pytest.raises(ValueError, match=r"(a copy of the model in float32 may do|must be able to follow Pair)"):
            lrc.export(model, file, example_input=inputs)
        assert list(tmp_path.iterdir()) == []
    else:
        saved = lrc.export(model, file, example_input=inputs).saved_bytes
        assert file.stat().st_size > 0
        assert saved % next(model.parameters()).element_size() == 0


CONFIGURATION = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 256}


@pytest.mark.situation("Out of the door", "outputs in a class of transformers, read by another process", "works")
@pytest.mark.parametrize("as_class", [True, False])
def test_line_that_reads_the_file_imports_what_it_needs(tmp_path, as_class):
    transformers = pytest.importorskip("transformers")
    options = transformers.BertConfig(num_hidden_layers=1, return_dict=as_class, **CONFIGURATION)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(options)
    lrc.factorize_(model, lrc.allocate(model, 0.8))
    tokens = torch.arange(6).reshape(2, 3)
    done = lrc.export(model, tmp_path / "bert.pt2", example_input={"input_ids": tokens})
    assert done.imports == (("transformers.modeling_outputs",) if as_class else ())
    code = f"import torch; {done.reload}; torch.save(model(input_ids=torch.arange(6).reshape(2, 3))[0], 'out.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens)[0]
    assert largest_difference(expected, torch.load(tmp_path / "out.pt")) < 1e-5
