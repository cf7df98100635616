"""Layers as other packages make them: quantized, scripted, adapted, wrapped for several processes."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lr_callback as lrc
from lr_callback.model.find import find_layers


def package(name):
    """Import a package that is not needed, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.situation("Module tricks", "quantized layers: torch.ao and torchao", "works")
def test_dynamically_quantized_layers_are_listed(reasons):
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    name = "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    assert reasons(quantized) == {"0.0": f"{name} is not among the layer types that are factorized"}


@pytest.mark.situation("Module tricks", "quantized layers: torch.ao and torchao", "works")
def test_weights_of_torchao_are_listed_by_their_class(reasons):
    quantization = package("torchao.quantization")
    layer = nn.Sequential(nn.Linear(32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    kind = type(layer[0].weight).__name__
    assert reasons(layer) == {"0.0": f"its weight is a {kind}, not a plain nn.Parameter; compress first"}


@pytest.mark.situation("Module tricks", "adapters of peft: LoRA, DoRA", "works")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_of_peft_are_left_alone_and_merge_as_before(named, options):
    peft = package("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(named(), peft.LoraConfig(target_modules=["first"], r=4, **options))
    nn.init.normal_(model.base_model.model.first.lora_B["default"].weight)
    found = find_layers(model)
    assert list(found.layers) == ["base_model.model.second"]
    inside = {f"base_model.model.first.{name}" for name in ("base_layer", "lora_A.default", "lora_B.default")}
    assert inside <= found.skipped.keys()
    assert all("inside an adapter of peft" in found.skipped[name] for name in inside)
    assert lrc.factorize_(model, lrc.allocate(model, 0.8)).factorized == ("base_model.model.second",)
    outputs = model(inputs := torch.randn(3, 32))
    model.merge_adapter()
    assert torch.allclose(model(inputs), outputs, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(inputs), outputs, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(inputs), outputs, atol=1e-5)
    assert list(find_layers(merged).layers) == ["first", "second"]


@pytest.mark.situation("Module tricks", "adapters of peft: layers that are trained and saved whole", "works")
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_what_peft_trains_and_saves_whole_is_left_alone_and_unloads_as_before(kind):
    peft = package("peft")
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(32, 32), second=nn.Linear(32, 32), last=nn.Linear(32, 32)))
    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    model = peft.get_peft_model(
        model, getattr(peft, kind)(target_modules=["first"], modules_to_save=["last"], **options)
    ).eval()
    found = find_layers(model)
    assert list(found.layers) == ["base_model.model.second"]
    for name in ("original_module", "modules_to_save.default"):
        reason = found.skipped[f"base_model.model.last.{name}"]
        assert reason == "one of peft's `modules_to_save`, whose weight it sets and saves; merge_and_unload() first"
    assert lrc.factorize_(model, lrc.allocate(model, 0.9)).factorized == ("base_model.model.second",)
    outputs = model(inputs := torch.randn(3, 32))
    merged = model.merge_and_unload()
    assert torch.allclose(merged(inputs), outputs, atol=1e-5)
    assert list(find_layers(merged).layers) == ["first", "second", "last"]


class Projecting(nn.Module):
    """Names a layer itself before an adapter goes around it."""

    def __init__(self, peft):
        super().__init__()
        network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.projection = network[0]
        self.network = peft.get_peft_model(network, peft.LoraConfig(target_modules=["0"], r=4))


@pytest.mark.situation("Module tricks", "adapters of peft: LoRA, DoRA", "works")
def test_an_adapted_layer_with_an_earlier_name_of_its_own_is_left_alone():
    peft = package("peft")
    torch.manual_seed(0)
    model = Projecting(peft)
    nn.init.normal_(model.network.base_model.model[0].lora_B["default"].weight)
    found = find_layers(model)
    assert list(found.layers) == ["network.base_model.model.2"]
    assert "inside an adapter of peft" in found.skipped["projection"]
    lrc.factorize_(model, lrc.allocate(model, 0.8))
    outputs = model.network(inputs := torch.randn(3, 32))
    assert torch.allclose(model.network.merge_and_unload()(inputs), outputs, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.situation("Bad input", "scripted and traced modules", "refused")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 32))])
def test_torchscript_is_left_alone(named, reasons, script, whole):
    scripted = script(named())
    reason = "inside a TorchScript module, which cannot be changed; compress first, then script or trace"
    if whole:
        assert find_layers(scripted).skipped == {"first": reason, "second": reason}
        with pytest.raises(ValueError, match=r"Nothing to factorize.*inside a TorchScript module"):
            lrc.allocate(scripted, 0.5)
    else:
        assert reasons(scripted) == {"0.first": reason, "0.second": reason}


@pytest.fixture
def one_process(tmp_path):
    """Open a group of processes that has this one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("one_process")
@pytest.mark.situation("Module tricks", "wrapped by DistributedDataParallel or FSDP outside of a Trainer", "refused")
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (nn.parallel.DistributedDataParallel, "held by the attribute _module_parameters of the model too"),
        (lambda one: FullyShardedDataParallel(one, use_orig_params=True, device_id=torch.device("cpu")), "inside FSDP"),
        (lambda one: FullyShardedDataParallel(one, device_id=torch.device("cpu")), "FullyShardedDataParallel is not"),
        (lambda one: fully_shard(one, mesh=init_device_mesh("cpu", (1,))), "its weight is sharded over processes"),
    ],
    ids=["ddp", "fsdp", "fsdp flat", "fsdp 2"],
)
def test_wrappers_that_keep_parameters_of_their_own_are_named(named, wrap, reason):
    wrapped = wrap(named())
    before = list(wrapped.modules())
    with pytest.raises(ValueError, match="Nothing to factorize") as refusal:
        lrc.allocate(wrapped, 0.5)
    assert reason in str(refusal.value)
    assert list(wrapped.modules()) == before


def test_data_parallel_holds_no_parameters_of_its_own(named):
    model = nn.DataParallel(named())
    assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized == ("module.first", "module.second")
    assert model(torch.randn(2, 32)).shape == (2, 32)
