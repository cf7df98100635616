"""Files of safetensors: every state dict comes back bit for bit, and damaged ones are refused."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.files.safetensors_file import is_safetensors, read_safetensors, same_tensors, write_safetensors

safetensors_torch = pytest.importorskip("safetensors.torch")


def state():
    base = torch.randn(6, 4)
    return {
        "plain": base,
        "the same": base,
        "a view of a part": base[2:4],
        "transposed": base.T,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "double": torch.tensor(1.5, dtype=torch.float64),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0, 3),
        "not a number": torch.tensor([torch.nan, torch.inf]),
    }


def test_comes_back_bit_for_bit_and_what_is_twice_is_written_once(tmp_path):
    path, written = tmp_path / "state.safetensors", state()
    write_safetensors(path, written, {"note": "text"})
    read = read_safetensors(path)
    assert same_tensors(written, read)
    assert torch.equal(read["transposed"], written["transposed"])
    assert path.stat().st_size < sum(one.nbytes for one in written.values()) - written["plain"].nbytes + 2000


def test_the_packages_own_loader_reads_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

    model, fresh, path = Tied(), Tied(), tmp_path / "model.safetensors"
    write_safetensors(path, model.state_dict(), {})
    safetensors_torch.load_model(fresh, path)
    assert torch.equal(fresh.head.weight, model.head.weight)


def test_same_tensors_sees_every_difference():
    one = {"a": torch.tensor([0.0, torch.nan])}
    assert same_tensors(one, {"a": torch.tensor([0.0, torch.nan])})
    for other in (
        {"b": one["a"]},
        {"a": torch.tensor([-0.0, torch.nan])},
        {"a": one["a"].double()},
        {"a": one["a"][:1]},
    ):
        assert not same_tensors(one, other)


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"layer\._extra_state: a safetensors file holds plain tensors alone, found dict"
    ):
        write_safetensors(tmp_path / "x", {"layer._extra_state": {"a": 1}}, {})


def test_what_has_no_plain_numbers_is_refused(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    message = r"0\.weight: a safetensors file holds plain tensors alone, found Int8Tensor .*Nothing was written"
    with pytest.raises(ValueError, match=message):
        lrc.export(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_known_by_its_beginning(tmp_path):
    path = tmp_path / "state"
    write_safetensors(path, {"a": torch.zeros(3)}, {})
    assert is_safetensors(path)
    for text in (b"", b"{}", b'        {"version": 1}', b"PK\x03\x04 and so on", b"\x10\0\0\0\0\0\0\0{"):
        path.write_bytes(text)
        assert not is_safetensors(path)
    torch.save({"a": torch.zeros(3)}, path)
    assert not is_safetensors(path)


@pytest.mark.parametrize("keep", [4, 60, -1])
@pytest.mark.situation("Out of the door", "a safetensors file that is cut off", "refused")
def test_damaged_file_is_refused_and_nothing_changed(tmp_path, keep):
    model, path = nn.Sequential(nn.Linear(64, 64)), tmp_path / "model.safetensors"
    write_safetensors(path, model.state_dict(), {})
    path.write_bytes(path.read_bytes()[:keep])
    before = model[0].weight.clone()
    with pytest.raises(
        ValueError, match=r"model.safetensors: must be a whole file of safetensors.*Nothing was changed"
    ):
        lrc.restore_(model, path)
    assert torch.equal(model[0].weight, before)


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"0.weight": torch.zeros(3, 3)}, {})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"model.safetensors: .*pip install 'lr_callback\[export\]'"):
        lrc.restore_(nn.Sequential(nn.Linear(3, 3)), path)


@pytest.mark.situation("Out of the door", "safetensors restored in a process without Lightning", "works")
def test_restored_in_a_fresh_process_with_torch_and_the_file_alone(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    lrc.export(model, tmp_path / "model.safetensors")
    torch.save((torch.ones(3, 64), model(torch.ones(3, 64)).detach()), tmp_path / "call.pt")
    program = """
import sys, torch, lr_callback
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
lr_callback.restore_(model, "model.safetensors")
inputs, outputs = torch.load("call.pt")
assert torch.equal(model(inputs), outputs)
assert not {"lightning", "pytorch_lightning", "onnx", "onnxruntime"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )


def test_a_file_of_another_model_is_refused_with_the_names(tmp_path):
    lrc.export(nn.Sequential(nn.Linear(8, 8)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"0.weight: shape \(9, 8\) in the model, shape \(8, 8\) in the file"):
        lrc.restore_(nn.Sequential(nn.Linear(8, 9)), tmp_path / "model.safetensors")
