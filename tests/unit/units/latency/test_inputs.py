"""What a layer is called with, described and made again."""

import pytest
import torch
from torch import nn

from lr_callback.units.latency import LayerInput


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 6, 6), (2, 3, 4, 5, 6), (1, 1, 1, 1), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_made_is_as_what_was_seen(shape, dtype):
    seen = torch.ones(shape, dtype=dtype)
    made = LayerInput.of(seen).made(seen.device, 1)
    assert (made.shape, made.dtype, made.stride()) == (seen.shape, dtype, seen.stride())
    assert made.isfinite().all()
    assert made.abs().max() > 0 or made.numel() == 1


@pytest.mark.parametrize(
    ("shape", "last"), [((2, 4, 6, 6), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)]
)
def test_channels_last_stay_so(shape, last):
    seen = torch.ones(shape).contiguous(memory_format=last)
    described = LayerInput.of(seen)
    assert described.channels_last
    assert described.made(seen.device, 1).stride() == seen.stride()
    assert str(described).endswith("float32 channels_last")


def test_indices_are_rows_of_the_table():
    table = nn.Embedding(5, 2)
    made = LayerInput.of(torch.zeros(3, 7, dtype=torch.int64)).made(torch.device("cpu"), table.num_embeddings)
    assert table(made).shape == (3, 7, 2)
    assert set(made.flatten().tolist()) == set(range(5))


def test_autocast_is_seen():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = LayerInput.of(torch.zeros(2, 3))
    assert (seen.autocast, str(seen)) == (torch.bfloat16, "2x3 float32 autocast bfloat16")
    assert LayerInput.of(torch.zeros(2, 3)).autocast is None


def test_making_one_draws_no_random_numbers():
    before = torch.get_rng_state()
    LayerInput((4, 4), torch.float32).made(torch.device("cpu"), 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "seen",
    [torch.ones(6, 4).t(), torch.ones(2, 8, 6, 6)[:, ::2], torch.ones(3, 1).expand(3, 5), torch.ones(2, 5, 9)[..., :4]],
    ids=["transposed", "every other channel", "expanded", "a part"],
)
def test_another_layout_is_made_again_and_is_another_input(seen):
    described = LayerInput.of(seen)
    made = described.made(seen.device, 1)
    assert (made.shape, made.stride()) == (seen.shape, seen.stride())
    assert made.isfinite().all()
    assert str(described) != str(LayerInput.of(seen.contiguous()))
    assert f"strides {'x'.join(map(str, seen.stride()))}" in str(described)


def test_indices_of_another_layout_are_rows_of_the_table():
    seen = torch.zeros(7, 3, dtype=torch.int64).t()
    assert set(LayerInput.of(seen).made(seen.device, 5).flatten().tolist()) == set(range(5))
