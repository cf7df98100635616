"""A tenth of the zoo, small models of all families, treated as the sweep treats all of it; and the sweep itself."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.zoo import rows
from benchmarks.zoo.case import Case
from benchmarks.zoo.catalogue import catalogue, share
from benchmarks.zoo.isolated import in_own_process
from benchmarks.zoo.treatment import NothingToFactorizeError, treat

TENTH = """
torchvision/squeezenet1_1 torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5
torchvision/lraspp_mobilenet_v3_large torchvision/ssdlite320_mobilenet_v3_large timm/test_byobnet timm/test_coatnet
timm/test_convnext timm/test_efficientnet timm/test_mambaout timm/test_maxvit timm/test_nfnet timm/test_resnet
timm/test_vit timm/starnet_s050 transformers/albert transformers/bart transformers/clip transformers/detr
transformers/llama transformers/mamba transformers/mixtral transformers/modernbert transformers/segformer
transformers/swinv2 transformers/t5 transformers/wav2vec2 transformers/whisper
"""


@pytest.mark.parametrize("key", TENTH.split())
def test_a_model_of_the_zoo(key: str):
    row = treat(catalogue()[key])
    assert row["factorized"] + row["stay_dense"] + sum(row["skipped"].values()) == row["layers"]
    assert row["factorized"] >= 2
    assert row["kept"] <= row["keep_ratio"] + 1e-4


def test_all_models_that_torchvision_lists_are_in_the_zoo():
    assert set(models.list_models()) == {case.name for case in catalogue().values() if case.package == "torchvision"}


def test_shards_share_all_keys():
    keys = [f"a/{number}" for number in range(10)] + ["b/0"]
    parts = [share(keys, "a/*", f"{number}/3") for number in (1, 2, 3)]
    assert sorted(key for part in parts for key in part) == keys[:10]
    for shard in ("0/3", "4/3", "2", "a/b"):
        with pytest.raises(ValueError, match="`shard` must be such as 2/4"):
            share(keys, "*", shard)


def test_the_page_is_that_of_the_rows():
    assert rows.page(rows.read()) == rows.PAGE.read_text(encoding="utf-8")


def statuses(start: str) -> dict[str, str]:
    return {row["key"]: row["status"] for row in rows.read() if row["status"].startswith(start)}


def test_no_model_failed():
    assert statuses("failed") == {}


def test_all_models_of_torchvision_were_run_and_the_page_says_how_many_others_were_not():
    left_out = statuses("not run")
    assert [key for key in left_out if key.startswith("torchvision/")] == [], f"{len(left_out)} models are not run"
    assert not left_out or f" {len(left_out)} not run" in rows.PAGE.read_text(encoding="utf-8")


def write_rows(path: Path, first: int) -> None:
    for number in range(first, first + 20):
        rows.update({"key": f"{number:02}", "status": "ok"}, path)


def test_shards_write_one_file_side_by_side(tmp_path):
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_rows, args=(path, first)) for first in (0, 10, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [row["key"] for row in rows.read(path)] == [f"{number:02}" for number in range(40)]
    rows.update({"key": "07", "status": "failed"}, path)
    assert [row["key"] for row in rows.read(path) if row["status"] == "failed"] == ["07"]


class Odd(nn.Module):
    """Gives outputs that depend on something that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.hidden = torch.rand(32)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features) + self.hidden


class Detached(nn.Module):
    """Gives its second layer's weight a gradient only while it is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, features: Tensor) -> Tensor:
        dense = isinstance(self.second, nn.Linear)
        return self.first(features) + (self.second(features) if dense else self.second(features).detach())


class Factorless(nn.Module):
    """Has no layer of a type that is factorized."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(32, 32, 4)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features, features)


def case_of(model: type[nn.Module]) -> Case:
    return Case("name", "package", model, lambda: (torch.ones(4, 32),))


def test_outputs_that_a_state_dict_does_not_give_back_are_found():
    with pytest.raises(AssertionError, match="a fresh model with the same state dict gives other outputs"):
        treat(case_of(Odd))


def test_factors_without_a_gradient_are_found():
    with pytest.raises(AssertionError, match="second: encoder has a gradient: False; the dense weight had one: True"):
        treat(case_of(Detached))


def test_a_model_with_nothing_to_factorize_says_what_it_skipped():
    with pytest.raises(NothingToFactorizeError) as caught:
        treat(case_of(Factorless))
    assert caught.value.row["skipped"] == {"Bilinear is not among the layer types that are factorized": 1}


def test_a_crash_is_a_row():
    assert in_own_process(sys.exit, "a process that ends", 1) == {"status": "failed: the process ended with 1"}
