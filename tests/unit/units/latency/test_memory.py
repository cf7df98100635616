"""Large outputs in memory that is used again: in a process of its own, whose heap nothing has shaped."""

import json
import platform
import subprocess
import sys

import pytest
import torch

from lr_callback.units.latency import LayerInput
from lr_callback.units.latency.memory import reused_memory, room_for

COUNT = """
import json, resource, torch
from lr_callback.units.latency.memory import reused_memory

def pages(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(25):
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
run = lambda: torch.zeros(10 * 2**20).add(1)  # 40 MiB, twice
outside = pages(run)
with reused_memory(8 * 40 * 2**20, torch.device("cpu")):
    inside = pages(run)
print(json.dumps([outside, inside]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what they like")
def test_blocks_come_from_the_system_once_and_not_at_each_call():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    outside, inside = json.loads(done.stdout)
    assert outside > 25 * 10_240  # pages of 4 KiB: at least one of the two blocks at each call
    # The first calls may have theirs at several places of the room, as small blocks fall between; each page comes once.
    assert inside < 8 * 10_240 + 2 * 4_096 + 1_000


def test_a_device_with_an_allocator_of_its_own_is_left_alone():
    with reused_memory(2**62, torch.device("meta")):
        pass


def test_room_is_for_all_inputs_once_and_for_the_largest_several_times():
    small, large = LayerInput((2, 3), torch.float32), LayerInput((5, 8), torch.bfloat16)
    assert room_for([small, large, large]) == 24 + 80 + 8 * 80
    assert room_for([]) == 0
