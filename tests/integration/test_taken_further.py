"""What other tools make of factorized models: TorchScript, torch.compile, torchao, ExecuTorch."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.common.example import largest_difference

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    layers = [nn.Conv2d(4, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 36, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


@pytest.fixture(scope="module", params=[1, 4], ids=["one slice", "four slices"])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = network()
    plan = lrc.allocate(made, 0.4, exclude=["0"])
    sizes = {"num_slices": request.param, "rank": 16 // request.param}
    one = next(iter(plan.factorized.values()))
    lrc.factorize_(made, replace(plan, layers={name: replace(one, **sizes) for name in plan.layers}))
    assert {one.num_slices for one in made.modules() if isinstance(one, lrc.FactorizedLinear)} == {request.param}
    return made


def images(rows):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(rows))


# torch says at every step that TorchScript is to be left.
@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:FutureWarning")
@pytest.mark.situation("Out of the door", "torch.jit.script", "works")
def test_scripted(model, tmp_path):
    torch.jit.save(torch.jit.script(model), tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts")
    for rows in (1, 3):
        assert largest_difference(model(images(rows)), loaded(images(rows))) < 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:FutureWarning")
def test_scripted_linear_takes_any_leading_dimensions():
    for num_slices in (1, 4):
        layer = lrc.FactorizedLinear(nn.Linear(16, 8), num_slices, rank=2)
        nn.init.normal_(layer.encoder.weight), nn.init.normal_(layer.decoder.weight), nn.init.zeros_(layer.decoder.bias)
        scripted = torch.jit.script(layer)
        for shape in ((16,), (3, 16), (2, 3, 4, 16), (0, 16)):
            assert torch.equal(scripted(torch.ones(shape)), layer(torch.ones(shape)))


@pytest.mark.parametrize("model", [4], indirect=True, ids=["four slices"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.situation("Out of the door", "torch.compile with inductor, one graph", "works")
def test_compiled_by_inductor_as_one_graph(model):
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5):
            assert largest_difference(model(images(rows)), compiled(images(rows))) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.situation("Out of the door", "torchao int8, weights alone and dynamic, on top", "works")
def test_quantized_by_torchao(model, config):
    quantization = pytest.importorskip("torchao.quantization")
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, getattr(quantization, config)())
    kinds = {name: type(one).__name__ for name, one in quantized.named_parameters()}
    encoders = {kinds[f"{layer}.encoder.weight"] for layer in ("5", "7")}
    assert {kinds[f"{layer}.decoder.weight"] for layer in ("5", "7")} == {"Int8Tensor"}
    assert encoders == ({"Int8Tensor"} if isinstance(model[5].encoder, nn.Linear) else {"Parameter"})
    with torch.no_grad():
        assert 0 < largest_difference(model(images(4)), quantized(images(4))) < 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # executorch reads its own files in an old way
@pytest.mark.situation("Out of the door", "ExecuTorch, edge dialect and program", "works")
def test_executorch_edge_dialect(model):
    exir = pytest.importorskip("executorch.exir", reason="needs pip install executorch, whose packages are many")
    with torch.no_grad():
        edge = exir.to_edge(torch.export.export(model, (images(2),)))
        assert largest_difference(model(images(2)), edge.exported_program().module()(images(2))) < 1e-5
    held = sum(one.numel() for one in edge.exported_program().parameters())
    assert held == sum(one.numel() for one in model.parameters())
    written = edge.to_executorch().buffer
    assert len(written) < 4 * held + 20_000
    runtime = pytest.importorskip("executorch.runtime", reason="needs the runtime of executorch")
    [found] = runtime.Runtime.get().load_program(written).load_method("forward").execute([images(2)])
    with torch.no_grad():
        assert largest_difference(model(images(2)), found) < 1e-5
