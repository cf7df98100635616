"""What a checkpoint says by itself: its record, its snapshots where they are now, sizes and scores."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.commands.recorded import recorded
from lr_callback.decisions.factorization import Spending
from lr_callback.host.record import Record


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes a checkpoint with a record, and what is in it."""

    def save(**changes):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
        allocation = lrc.allocate(model, 0.6)
        lrc.factorize_(model, allocation)
        record = Record(applied=(1, 3), allocation=changes.pop("allocation", allocation), **changes.pop("record", {}))
        loaded = {
            "epoch": 4, "global_step": 50, "pytorch-lightning_version": "2.6.0", "state_dict": model.state_dict(),
            "optimizer_states": [torch.zeros(10_000)], "callbacks": {"Mine": record.to_dict(), **changes},
        }  # fmt: skip
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        path = tmp_path / "checkpoints" / "last.ckpt"
        torch.save(loaded, path)
        return path, loaded, allocation

    return save


def test_record_of_a_subclass_sizes_and_training(saved):
    path, loaded, allocation = saved()
    said = recorded(path, loaded)
    assert said.record.applied == (1, 3) and said.allocation == allocation
    assert said.training == {
        "epoch of the checkpoint, from 0": "4", "optimizer steps until then": "50", "Lightning that wrote it": "2.6.0",
    }  # fmt: skip
    values = sum(value.nbytes for value in loaded["state_dict"].values())
    assert values < said.file_bytes < values + 5000 < path.stat().st_size
    dense, now = said.stages()
    assert (dense.parameters, now.parameters) == (allocation.dense_cost, allocation.cost)
    assert (dense.file_bytes, now.file_bytes, now.multiply_adds) == (0, said.file_bytes, 0)


def test_what_was_counted_in_other_units_is_told(saved):
    *_, allocation = saved()
    other = replace(allocation, unit="bytes", others={"multiply_adds": Spending(5, 9, 6)})
    dense, now = recorded(*saved(allocation=other)[:2]).stages()
    assert (dense.parameters, now.parameters, dense.multiply_adds, now.multiply_adds) == (0, 0, 9, 5)


def test_snapshots_are_found_beside_the_run_first_then_where_they_were_written(saved, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "compression"
    beside = tmp_path / "compression"
    for folder, names in ((elsewhere, ("dense", "cut")), (beside, ("cut",))):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.ckpt").write_bytes(b"1234")
    noted = {name: str(elsewhere / f"{name}.ckpt") for name in ("cut", "dense", "final")}
    said = recorded(*saved(record={"snapshot_files": noted})[:2])
    assert said.snapshots == {"dense": elsewhere / "dense.ckpt", "cut": beside / "cut.ckpt"}
    assert [stage.name for stage in said.stages()] == ["dense, before", "right after", "this checkpoint"]
    assert [stage.file_bytes for stage in said.stages()][:2] == [4, 4]


def test_scores_of_other_callbacks(saved):
    state = {"monitor": "val_loss", "current_score": torch.tensor(0.25), "best_model_score": 0.125}
    path, loaded, _ = saved(one=state, two={"monitor": None, "current_score": torch.tensor(1.0)}, three=[1])
    assert recorded(path, loaded).scores == {"val_loss, at this checkpoint": "0.25", "val_loss, best so far": "0.125"}


def test_an_allocation_beside_the_weights_is_enough(saved):
    path, loaded, allocation = saved()
    said = recorded(path, {"state_dict": loaded["state_dict"], "allocation": allocation.to_json()})
    assert said.allocation == allocation and said.record.applied == () and said.scores == {}


def test_before_a_compression_and_without_one(saved):
    path, loaded, _ = saved(allocation=None)
    with pytest.raises(ValueError, match="must be of a moment after a compression, found that none had been made yet"):
        recorded(path, loaded)
    for callbacks in ({"EarlyStopping": {"wait": 1}}, None, 3):
        with pytest.raises(ValueError, match="must be written by a Trainer with LowRankCompression, found nothing"):
            recorded(path, {**loaded, "callbacks": callbacks})


def test_a_record_of_another_program_is_refused(saved):
    path, loaded, _ = saved()
    loaded["callbacks"] = {"LowRankCompression": {"allocation": 1, "applied": 2}}
    with pytest.raises(ValueError, match="is not a record of a run as lr_callback writes it"):
        recorded(path, loaded)
