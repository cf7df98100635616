"""Networks that read weights directly, tie them, trace themselves or are called otherwise: outputs and costs."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import lr_callback as lrc
from lr_callback.files.safetensors_file import read_safetensors
from lr_callback.model.find import find_layers
from lr_callback.model.observe import Observation, observe


def counted(model, *inputs, **named):
    """Return the multiply-adds that torch counts, without the fused path that it cannot see into."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, **named)
    return counter.get_total_flops() // 2


def randomize(model):
    """Give every parameter values of a size that shows in the outputs, biases and scales included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def swin(version):
    torch.manual_seed(0)
    later = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    sizes = ([4, 4], 24, [2, 2], [2, 4], [4, 4])
    return randomize(torchvision.models.SwinTransformer(*sizes, num_classes=10, **later)).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


@pytest.mark.situation("Module tricks", "weights read directly (torchvision's Swin and Swin v2)", "works")
@pytest.mark.parametrize("version", [1, 2])
def test_swin_reads_the_product_and_the_multiply_adds_are_those_of_torch(version, images):
    model = swin(version)
    dense = observe(model, images)
    assert dense.dense_multiply_adds == counted(model, images)
    assert set(dense.reads.values()) == {1}
    assert {name.rpartition(".")[2] for name in dense.reads} == {"qkv", "proj"}
    allocation = lrc.allocate(model, 0.5)
    assert set(lrc.factorize_(model, allocation).factorized) >= set(dense.reads)
    assert sum(one.numel() for one in model.parameters()) == allocation.cost
    assert dense.multiply_adds(model) == counted(model, images)
    assert observe(model, images) == dense == Observation.from_dict(dense.to_dict())
    outputs = model(images)
    back = copy.deepcopy(model)
    assert len(lrc.densify_(back).densified) == len(allocation.factorized)
    torch.testing.assert_close(back(images), outputs, rtol=1e-4, atol=1e-3)
    outputs.square().mean().backward()
    assert all(one.grad is not None for one in model.parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_a_weight_that_is_read_directly_saves_no_multiply_adds_and_says_so(version, images):
    model = swin(version)
    allocation = lrc.allocate(model, 0.6, cost="multiply_adds", example_input=images)
    reason = "its weight is read directly, not only by its forward: there it saves no multiply-adds"
    read = {name for name, why in allocation.skipped.items() if why == reason}
    assert read == set(observe(model, images).reads)
    lrc.factorize_(model, allocation)
    assert counted(model, images) == allocation.cost <= allocation.budget


class ReadAndCalled(nn.Module):
    """Calls its layer, and multiplies with its weight too."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, inputs):
        assert self.layer.weight.dtype == inputs.dtype
        return nn.functional.linear(self.other(self.layer(inputs)), self.layer.weight)


def test_a_layer_that_is_called_and_read_is_counted_as_both():
    model, inputs = ReadAndCalled(), torch.randn(64, 32)
    dense = observe(model, inputs)
    assert dense.reads == {"layer": 2}
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    assert isinstance(model.layer, lrc.FactorizedLinear)
    assert dense.multiply_adds(model) == counted(model, inputs)
    assert observe(model, inputs) == dense


def test_watching_leaves_the_parameters_where_they_were():
    model = ReadAndCalled()
    before = [layer._parameters for layer in model.modules()]
    observe(model, torch.randn(2, 32))
    assert all(layer._parameters is one for layer, one in zip(model.modules(), before, strict=True))
    assert all(type(one) is dict for one in before)
    with pytest.raises(ValueError, match=r"must run on it in eval mode .* shapes cannot be multiplied"):
        observe(model, torch.randn(2, 31))
    assert all(layer._parameters is one for layer, one in zip(model.modules(), before, strict=True))


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)
        self.read = nn.Linear(64, 64)

    def forward(self, inputs):
        return nn.functional.linear(self.used(inputs), self.read.weight)


@pytest.mark.situation("Module tricks", "layers that are never called", "works")
def test_what_an_example_does_not_use_is_left_alone_and_without_one_it_is_not():
    model = Partly()
    assert list(lrc.allocate(model, 0.8).layers) == ["used", "unused", "read"]
    allocation = lrc.allocate(model, 0.8, example_input=torch.zeros(2, 64))
    assert list(allocation.layers) == ["used", "read"]
    assert allocation.skipped == {"unused": "not used on the example input: neither called, nor its weight read"}
    lrc.factorize_(model, allocation)
    assert sum(one.numel() for one in model.parameters()) == allocation.cost


def transformer(kind):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0}
    if kind == "encoder":
        return randomize(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **options), 2))
    if kind == "decoder":
        return randomize(nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, **options), 2))
    return randomize(nn.Transformer(32, 4, 1, 1, 64, **options))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.situation("Module tricks", "nn.Transformer: encoder, decoder, fused path, nested tensors", "works")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
def test_transformers_compute_what_their_dense_form_does_on_every_path(kind, training, grad):
    model = transformer(kind)
    assert lrc.factorize_(model, lrc.allocate(model, 0.8)).factorized
    dense = copy.deepcopy(model)
    lrc.densify_(dense)
    inputs = [torch.randn(2, 6, 32) for _ in range(1 if kind == "encoder" else 2)]
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    named = {"src_key_padding_mask": padding} if kind != "decoder" else {"memory_key_padding_mask": padding}
    with torch.set_grad_enabled(grad):
        outputs, expected = (one.train(training)(*inputs, **named) for one in (model, dense))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_the_fused_path_of_an_encoder_is_taken_with_factors_too():
    model = transformer("encoder").eval()
    lrc.factorize_(model, lrc.allocate(model, 0.8))
    called = []
    model.layers[0].linear1.decoder.register_forward_hook(lambda *_: called.append(1))
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            with torch.no_grad():
                model(torch.randn(2, 6, 32))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert called


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def tiny(transformers, name):
    torch.manual_seed(0)
    common = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=64, **common))
    if name == "llama":
        heads = {"num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads))
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **sizes))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.situation("Module tricks", "tied embeddings and heads (transformers)", "works")
@pytest.mark.parametrize(
    ("name", "head", "embedding"),
    [
        ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
        ("llama", "lm_head", "model.embed_tokens"),
        ("t5", "lm_head", "shared"),
    ],
)
def test_a_tied_head_stays_tied_and_everything_is_counted(transformers, name, head, embedding, tmp_path):
    model = tiny(transformers, name).eval()
    inputs = {"input_ids": torch.arange(1, 15).view(2, 7)}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    dense = observe(model, inputs)
    assert dense.dense_multiply_adds == counted(model, **inputs)
    allocation = lrc.allocate(model, 0.85)
    assert allocation.skipped[head].startswith(f"its weight is tied to that of {embedding}")
    lrc.factorize_(model, allocation)
    assert model.get_submodule(head).weight is model.get_submodule(embedding).weight
    assert sum(one.numel() for one in model.parameters()) == allocation.cost
    assert dense.multiply_adds(model) == counted(model, **inputs)
    outputs = model(**inputs).logits
    model.tie_weights()
    assert torch.equal(model(**inputs).logits, outputs)
    fresh = tiny(transformers, name).eval()
    lrc.restore_(fresh, model.state_dict())
    assert torch.equal(fresh(**inputs).logits, outputs)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert len(read_safetensors(file)) < len(model.state_dict())  # without the second names of what is tied
    fresh = tiny(transformers, name).eval()
    lrc.restore_(fresh, file)
    assert torch.equal(fresh(**inputs).logits, outputs)
    assert fresh.get_submodule(head).weight is fresh.get_submodule(embedding).weight
    lrc.densify_(model)
    torch.testing.assert_close(model(**inputs).logits, outputs, rtol=1e-4, atol=1e-5)


class Traced(nn.Module):
    """Calls a layer, and reads the weight of another."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, inputs):
        return nn.functional.linear(self.called(inputs).relu(), self.read.weight, self.read.bias)


@pytest.mark.situation("Module tricks", "graphs of torch.fx that call layers or read weights", "works")
def test_a_graph_of_fx_computes_with_the_factors():
    torch.manual_seed(0)
    graph, inputs = torch.fx.symbolic_trace(Traced()), torch.randn(8, 64)
    assert {node.op for node in graph.graph.nodes} >= {"call_module", "get_attr"}
    dense = observe(graph, inputs)
    # A layer of which a graph reads the weight alone is there no layer any more, but a plain module that holds it.
    assert find_layers(graph).skipped == {"read": "Module is not among the layer types that are factorized"}
    assert lrc.factorize_(graph, lrc.allocate(graph, 0.7)).factorized == ("called",)
    graph.graph.lint()
    graph.recompile()
    assert dense.multiply_adds(graph) == counted(graph, inputs)
    outputs = graph(inputs)
    torch.testing.assert_close(torch.fx.Interpreter(graph).run(inputs), outputs)
    lrc.densify_(graph)
    torch.testing.assert_close(graph(inputs), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.situation("Module tricks", "compiled parts of a network", "works")
def test_a_part_that_is_compiled_computes_with_the_factors_and_a_layer_alone_is_left():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)), torch.eye(64)
    model[1].compile(backend="eager")
    model[2].compile(backend="eager")
    model(inputs)
    allocation = lrc.allocate(model, 0.7)
    assert "it is compiled on its own" in allocation.skipped["2"]
    assert lrc.factorize_(model, allocation).factorized == ("0", "1.0")
    outputs = model(inputs)
    lrc.densify_(model)
    torch.testing.assert_close(model(inputs), outputs, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.again = nn.ModuleList([self.layer, nn.ModuleDict({"inner": self.layer})])

    def forward(self, inputs):
        return self.again[1]["inner"](self.again[0](self.layer(inputs)))


@pytest.mark.situation("Module tricks", "a layer under several names, called several times", "works")
def test_a_layer_under_several_names_is_one_and_is_counted_at_each_call():
    model, inputs = Shared(), torch.randn(4, 64)
    dense = observe(model, inputs)
    assert len(dense.calls["layer"]) == 3
    allocation = lrc.allocate(model, 0.5, cost="multiply_adds", example_input=inputs)
    assert list(allocation.layers) == ["layer"]
    lrc.factorize_(model, allocation)
    assert model.layer is model.again[0] is model.again[1]["inner"]
    assert isinstance(model.layer, lrc.FactorizedLinear)
    assert counted(model, inputs) == allocation.cost == dense.multiply_adds(model)


def test_what_is_replaced_by_nothing_is_no_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1] = nn.Identity()
    model.register_module("gone", None)
    assert list(find_layers(model).layers) == ["0"]
    assert lrc.factorize_(model, lrc.allocate(model, 0.5)).factorized == ("0",)
