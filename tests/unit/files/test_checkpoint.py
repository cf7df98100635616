"""Checkpoints: the structure comes back from the file itself, in both directions, or the model stays as it is."""

import copy
import subprocess
import sys
from inspect import getsource

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lr_callback as lrc
from lr_callback.files.checkpoint import adapt_structure
from lr_callback.files.hook import install_hook
from lr_callback.files.source import read_checkpoint
from lr_callback.mathematics.folding import FOLDINGS


def network(seed=0, width=32):
    torch.manual_seed(seed)
    first, second = nn.Linear(256, width), nn.Linear(width, 8)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), first, second)


def mlp(seed=0):
    """Return a model of which every entry belongs to a layer, also those named encoder and decoder."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"encoder": nn.Linear(32, 24), "decoder": nn.Linear(24, 32)})


def shared(seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, nn.ReLU(), layer)


def compressed(model, keep_ratio=0.5):
    assert lrc.factorize_(model, lrc.allocate(model, keep_ratio)).factorized
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


class Wrapped(nn.Module):
    """A training module that holds the network under a name, beside something else."""

    def __init__(self, inner):
        super().__init__()
        self.network, self.loss = inner, nn.Linear(2, 2)


@pytest.mark.parametrize("make", [network, mlp, shared])
@pytest.mark.parametrize("source_ratio", [None, 0.5])
@pytest.mark.parametrize("own_ratio", [None, 0.5, 0.7])
@pytest.mark.parametrize("form", ["state", "checkpoint", "prefix", "file"])
def test_structure_and_weights_come_back_whatever_the_model_has_now(make, source_ratio, own_ratio, form, tmp_path):
    model, source = make(1), make(2)
    if own_ratio:
        compressed(model, own_ratio)
    if source_ratio:
        compressed(source, source_ratio)
    wanted, path = state(source), tmp_path / "last.ckpt"
    checkpoint = {"state_dict": wanted, "epoch": 3, "callbacks": {}}
    torch.save(checkpoint, path)
    forms = {"state": wanted, "checkpoint": checkpoint, "prefix": Wrapped(source).state_dict(), "file": path}
    lrc.restore_(model, forms[form])
    assert same(state(model), wanted)
    assert repr(model) == repr(source)
    assert make is not shared or model[0] is model[2]


class Versioned(nn.Sequential):
    """Loads only what says which version of it was written, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.loaded = local_metadata.get("version")
        assert self.loaded in (1, 2)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "network."])
@pytest.mark.parametrize(
    ("form", "expected"), [("same version", 2), ("older version", 1), ("file", 2), ("plain dict of tensors", 2)]
)
def test_versions_of_modules_are_loaded_with_them(prefix, form, expected, tmp_path):
    model = Versioned(nn.Linear(32, 32))
    compressed(model)
    source = (nn.ModuleDict({"network": model}) if prefix else model).state_dict()
    if form == "older version":
        source._metadata[prefix.rstrip(".")]["version"] = 1
    if form == "plain dict of tensors":
        source = dict(source)
    if form == "file":
        torch.save(source, tmp_path / "state.pt")
        source = tmp_path / "state.pt"
    fresh = Versioned(nn.Linear(32, 32))
    lrc.restore_(fresh, source)
    assert fresh.loaded == expected
    assert torch.equal(fresh[0].weight, model[0].weight)


@pytest.mark.parametrize("form", ["object", "dict", "text", "path", "str"])
def test_an_allocation_factorizes_the_weights_of_the_model_itself(form, tmp_path):
    model = network()
    allocation = lrc.allocate(model, 0.5)
    wanted = copy.deepcopy(model)
    lrc.factorize_(wanted, allocation)
    text = allocation.to_json(path := tmp_path / "allocation.json")
    sources = {"object": allocation, "dict": allocation.to_dict(), "text": text, "path": path, "str": str(path)}
    lrc.restore_(model, sources[form])
    assert same(state(model), state(wanted))


def test_all_foldings_come_back_from_the_shapes():
    choices = {str(i): lrc.Factorization(name, 2, 2, 0, 0, 1) for i, name in enumerate(FOLDINGS)}
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv3d(4, 4, (2, 3, 5), padding=1) for _ in choices))
    fresh = copy.deepcopy(model)
    shapes = {name: (4, 4, 2, 3, 5) for name in choices}
    lrc.factorize_(model, lrc.Allocation(choices, {}, shapes, 0, 1, 0, 1.0))
    lrc.restore_(fresh, model.state_dict())
    assert [layer.folding for layer in fresh] == list(FOLDINGS)
    assert torch.equal(fresh(inputs := torch.randn(1, 4, 8, 8, 20)), model(inputs))


def test_device_and_dtype_of_the_model_are_kept():
    model = network(1).double()
    lrc.restore_(model, compressed(network(2)).state_dict())
    assert {one.dtype for one in model.parameters()} == {torch.float64}


def test_buffers_that_are_not_saved_do_not_hide_the_prefix():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

    model, source = Host(), compressed(Host())
    lrc.restore_(model, Wrapped(source).state_dict())
    assert same(state(model), state(source))


def test_a_lazy_model_takes_a_dense_file():
    model, source = nn.Sequential(nn.LazyLinear(8)), nn.Sequential(nn.Linear(4, 8))
    lrc.restore_(model, source.state_dict())
    assert same(state(model), state(source))


def refused(model, source, message, error=ValueError):
    """Check that a source is refused and that every bit and object of the model is as before."""
    before, modules = state(model), list(model.modules())
    with pytest.raises(error, match=message):
        lrc.restore_(model, source)
    assert list(model.modules()) == modules
    assert same(state(model), before)


@pytest.mark.parametrize("own", [network, lambda: compressed(network())], ids=["dense", "factorized"])
@pytest.mark.parametrize("other", [lambda: network(width=16), lambda: compressed(network(width=16)), mlp, nn.ReLU])
def test_a_checkpoint_of_another_architecture_is_refused(own, other):
    refused(own(), {"state_dict": other().state_dict()}, "Nothing was changed")


def test_the_difference_is_told_by_name_and_shape():
    message = (
        r"2 of 12 names or shapes differ: 4\.bias: shape \(8,\) in the model, nothing in the file;"
        r" 9\.x: nothing in the model, shape"
    )
    entries = network().state_dict()
    del entries["4.bias"]
    refused(network(), {**entries, "9.x": torch.zeros(3)}, message)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [((4, 256), (31, 4)), ((4, 256), (32, 5)), ((4, 100), (32, 4)), ((4,), (32, 4)), ((0, 256), (32, 0))],
    ids=str,
)
def test_factors_whose_shapes_do_not_fit_are_refused(encoder, decoder):
    entries = {name: value for name, value in network().state_dict().items() if not name.startswith("3.")}
    entries |= {"3.encoder.weight": torch.zeros(encoder), "3.decoder.weight": torch.zeros(decoder)}
    refused(network(), entries, r"^3: the factors in the state dict must multiply to a weight of shape \(32, 256\)")


def test_two_layers_of_a_file_do_not_fit_into_a_shared_one():
    untied = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    lrc.factorize_(untied, lrc.allocate(untied, 0.7, include="0"))
    refused(shared(), untied.state_dict(), r"2\.encoder\.weight: shape \(8, 16\) in the model, nothing in the file")


@pytest.mark.parametrize("part", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("start", [b"", b"not a checkpoint"])
def test_a_file_that_was_cut_off_or_is_foreign_is_refused(part, start, tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": network().state_dict()}, path)
    path.write_bytes(start + path.read_bytes()[: int(part * path.stat().st_size)])
    message = (
        r"that torch\.load.*cut off" if part and not start else "as ModelCheckpoint or torch.save writes it, found "
    )
    refused(network(), path, rf"last\.ckpt: must be a checkpoint,? {message}.*Nothing was changed")


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "an empty file"), (b"compress: {}\n", "a text"), (b"\0\1\2", "another kind of file")]
)
def test_a_file_of_another_kind_is_told_without_advice_to_unpickle_it(content, found, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"found {found}; give the checkpoint of a run, or a file of weights"
    ) as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_why_a_damaged_file_is_not_read_is_told_without_torchs_advice(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"\x80\x02none of a pickle")
    with pytest.raises(ValueError, match=r"\(UnpicklingError: .+\)\. Name another") as caught:
        read_checkpoint(path, "Name another.")
    assert "trusted source" not in str(caught.value) and "arbitrary code" not in str(caught.value)


def test_a_file_with_pickled_objects_is_never_unpickled(tmp_path):
    torch.save(network(), tmp_path / "model.pt")
    refused(network(), tmp_path / "model.pt", r"objects other than tensors and plain data.*Nothing was changed")


def test_what_is_no_plain_data_in_a_file_is_named(tmp_path):
    torch.save({"state_dict": network().state_dict(), "hyper_parameters": {"root": tmp_path}}, tmp_path / "last.ckpt")
    refused(network(), tmp_path / "last.ckpt", r"plain data \(UnpicklingError: it holds pathlib\.\w+\)\. If you trust")


def test_a_file_must_hold_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    refused(network(), tmp_path / "list.pt", "list.pt: must hold a dict, found list")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    assert read_checkpoint(tmp_path / "dict.pt") == {"a": 1}


@pytest.mark.parametrize("name", ["gone.ckpt", "gone.json", "."])
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    refused(network(), tmp_path / name, "no such file; `source` must be", FileNotFoundError)


@pytest.mark.parametrize("source", [3, None, [1], 0.5, {1, 2}], ids=repr)
def test_a_source_of_another_type_is_refused(source):
    refused(network(), source, "`source` must be an Allocation, a dict, JSON text or a path, got", TypeError)


@pytest.mark.parametrize("source", [{}, {"state_dict": {}}, {"state_dict": 3}, {"a": 1}, {1: torch.zeros(1)}], ids=str)
def test_a_dict_without_weights_is_refused(source):
    refused(network(), source, "`source`: must be an allocation, a Lightning checkpoint or a state dict of tensors")


def test_the_hook_adapts_the_structure_whenever_a_state_dict_is_loaded_and_is_put_in_once():
    model, source = Wrapped(network(1)), Wrapped(compressed(network(2)))
    install_hook(model)
    install_hook(model)
    assert len(model._load_state_dict_pre_hooks) == 1
    model.load_state_dict(source.state_dict())
    assert same(state(model), state(source))
    dense = Wrapped(network(3))
    copy.deepcopy(model).load_state_dict(dense.state_dict())
    assert isinstance(model.network[3], lrc.FactorizedLinear)
    model.load_state_dict(dense.state_dict())
    assert same(state(model), state(dense))


@pytest.mark.parametrize("folding", list(FOLDINGS))
def test_loading_its_own_state_dict_replaces_no_layer(folding):
    model = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, (1, 3)))
    lrc.factorize_(model, lrc.allocate(model, 0.6, method=lrc.ALDS(foldings=[folding])))
    install_hook(model)
    layers = list(model)
    model.load_state_dict(state(model))
    assert all(one is other for one, other in zip(model, layers, strict=True))


def test_adapt_structure_takes_a_prefix_and_leaves_alone_what_is_not_in_the_file():
    model, source = network(1), compressed(network(2))
    entries = {f"a.b.{name}": value for name, value in source.state_dict().items() if name.startswith("3.")}
    adapt_structure(model, entries, prefix="a.b.")
    assert isinstance(model[3], lrc.FactorizedLinear)
    assert [factor.shape for factor in model[3].factors] == [factor.shape for factor in source[3].factors]
    assert type(model[0]) is nn.Conv2d


class Trained(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network(1)

    def training_step(self, batch):
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a source of each kind, and restore it in a process without Lightning; yield the wanted weights."""
    folder = tmp_path_factory.mktemp("files")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback, trained = lrc.LowRankCompression(0.5, 0, show_table=False), Trained()
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(trained, DataLoader(torch.randn(4, 3, 6, 6), 4))
    assert isinstance(trained.network[3], lrc.FactorizedLinear)
    trainer.save_checkpoint(folder / "last.ckpt")
    made, allocation = network(0), lrc.allocate(network(0), 0.5)
    allocation.to_json(folder / "allocation.json")
    lrc.factorize_(made, allocation)
    torch.save(trained.network.state_dict(), folder / "weights.pt")
    torch.save(dense := state(network(2)), folder / "dense.pt")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", getsource(network) + ALONE, str(folder)], check=True, timeout=120
    )
    last = state(trained.network)
    return folder, {"last.ckpt": last, "weights.pt": last, "dense.pt": dense, "allocation.json": state(made)}


ALONE = """
import sys
from pathlib import Path
import torch
from torch import nn
import lr_callback as lrc

for path in sorted(Path(sys.argv[1]).iterdir()):
    dense, factorized = network(), network()
    lrc.factorize_(factorized, lrc.allocate(factorized, 0.7))
    lrc.restore_(dense, path)
    if path.suffix != ".json":
        lrc.restore_(factorized, path)
        assert repr(factorized) == repr(dense)
    torch.save(dense.state_dict(), path.with_suffix(".restored"))
assert not {"lightning", "pytorch_lightning", "torchmetrics", "torchvision"} & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["last.ckpt", "weights.pt", "dense.pt", "allocation.json"])
def test_everything_comes_back_in_a_process_that_never_imports_lightning(files, name):
    folder, wanted = files
    restored = torch.load((folder / name).with_suffix(".restored"), weights_only=True)
    assert same(restored, wanted[name])


def test_a_lightning_checkpoint_goes_into_the_module_and_as_a_dict_too(files):
    folder, wanted = files
    loaded = torch.load(folder / "last.ckpt", weights_only=True)
    for model, inner in ((Trained(), lambda model: model.network), (network(), lambda model: model)):
        lrc.restore_(model, loaded)
        assert same(state(inner(model)), wanted["last.ckpt"])


class Extra(nn.Sequential):
    def get_extra_state(self):
        return torch.tensor(1)

    def set_extra_state(self, state):
        raise AssertionError("not taken")


@pytest.mark.parametrize(("form", "raised"), [("missing", ValueError), ("refused", AssertionError)])
def test_a_module_that_does_not_take_its_part_leaves_all_as_it_was(form, raised):
    model = (nn.Sequential if form == "missing" else Extra)(nn.Linear(32, 32))
    compressed(model)
    fresh = Extra(nn.Linear(32, 32))
    layer, before = fresh[0], fresh[0].weight.clone()
    with pytest.raises(raised, match=r"(?s)not take.*Nothing was changed" if form == "missing" else "not taken"):
        lrc.restore_(fresh, model.state_dict())
    assert fresh[0] is layer
    assert torch.equal(layer.weight, before)


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match=r"found 2 on the meta device, the first is 0\.weight; call `model\.to_empty"):
        lrc.restore_(nn.Sequential(nn.Linear(4, 4, device="meta")), nn.Sequential(nn.Linear(4, 4)).state_dict())


def test_the_reason_why_a_layer_can_only_be_dense_is_given():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    compressed(model)
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0 can only be dense here: its weight is tied to that of 1\."):
        lrc.restore_(tied, model.state_dict())
