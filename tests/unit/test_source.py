"""What a model can be restored from, beyond the plain cases."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.hook import install_hook


class Counting(nn.Module):
    """A module whose extra state is a dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.calls = 3

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def test_an_allocation_is_known_by_its_content_not_by_the_name_of_its_file(tmp_path):
    model, fresh = network(), network()
    allocation = lrc.allocate(model, 0.5)
    allocation.to_json(tmp_path / "allocation.txt")
    lrc.restore_(fresh, tmp_path / "allocation.txt")
    assert sum(parameter.numel() for parameter in fresh.parameters()) == allocation.cost


def test_extra_state_is_restored_and_does_not_stand_in_the_way(tmp_path):
    model, fresh = Counting(), Counting()
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    model.calls = 7
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    lrc.restore_(fresh, tmp_path / "last.ckpt")
    assert fresh.calls == 7
    assert torch.equal(fresh.body[0].weight, model.body[0].weight)


def test_a_file_with_objects_names_the_way_for_a_trusted_one(tmp_path):
    torch.save({"state_dict": network().state_dict(), "made_by": network()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"restore_\(model, torch\.load\(path, weights_only=False\)\)"):
        lrc.restore_(network(), tmp_path / "last.ckpt")


def test_a_strict_load_of_another_model_changes_nothing_and_says_what_differs():
    model, other = network(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9))
    lrc.factorize_(other, lrc.allocate(other, 0.6, include="0"))
    install_hook(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"names or shapes differ: .*Nothing was changed"):
        model.load_state_dict(other.state_dict())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "allocation.json").write_bytes(b'{"version": 1, \xff\xfe')
    with pytest.raises(ValueError, match=r"allocation\.json': must be JSON in UTF-8"):
        lrc.restore_(network(), tmp_path / "allocation.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unit", "bananas", "`unit` must be one of"),
        ("keep_ratio", 7, r"`keep_ratio` must be in \(0, 1\], got 7"),
        ("dense_cost", 0, "`cost` must be from 0 to `dense_cost`"),
        ("cost", -1, "`cost` must be from 0 to `dense_cost`"),
        ("skipped", {3: "a reason"}, "names of layers must be strings"),
    ],
)
def test_an_allocation_out_of_range_is_refused(field, value, message):
    written = lrc.allocate(network(), 0.5).to_dict()
    with pytest.raises(ValueError, match=message):
        lrc.restore_(network(), {**written, field: value})


def test_a_layer_that_costs_nothing_is_refused():
    written = lrc.allocate(network(), 0.5).to_dict()
    name = next(name for name, layer in written["layers"].items() if layer is not None)
    written["layers"][name]["dense_cost"] = 0
    with pytest.raises(ValueError, match=f"layer '{name}': `cost` must be above 0 and at most `dense_cost`"):
        lrc.Allocation.from_dict(written)
