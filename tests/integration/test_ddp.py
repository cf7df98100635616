"""A cut on several processes: every rank goes on with the same bits and the same averaged gradients, or all stop."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).with_name("ddp_run.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
STEPS = {2: 6, 3: 4}
"""Number of processes -> batches of an epoch."""

TRAINED = {
    "plain": "DDP",
    "find_unused_parameters": "DDP with find_unused_parameters",
    "static_graph": "DDP with static_graph",
    "static_graph, manual optimization": "DDP with static_graph, manual optimization",
    "gradient_as_bucket_view": "DDP with gradient_as_bucket_view",
    "small buckets": "DDP with small buckets",
    "PowerSGD hook": "DDP with a PowerSGD hook",
    "bf16 hook": "DDP with a bf16 hook",
    "accumulation": "DDP, gradient accumulation",
    "manual optimization": "DDP, manual optimization",
    "gradients gathered over a cut": "DDP, manual optimization with gradients gathered over a cut",
    "bf16-mixed": "DDP, bf16-mixed",
    "bf16-true": "DDP, bf16-true",
    "Adam": "DDP, Adam",
    "batch norm": "DDP, batch norm",
    "repaired": "DDP, refit and BatchNorm recalibrated on the batches of all processes",
    "clipping": "DDP, gradient clipping",
    "weighed by effects": "DDP, errors weighted by activations, layers by their effects, repaired",
    "weighed by BatchNorm": "DDP, errors weighted by BatchNorm",
    "weighed by Adam": "DDP, errors weighted by mean squared gradients",
    "distilled": "DDP, distillation",
    "factors of other signs": "DDP with init_sync=False",
}
"""Case -> the situation."""
FAILED = {
    "fails in the analysis": "ArithmeticError: no convergence",
    "fails with NaN": "ValueError: network.4: every weight must be finite, found 1 of 3072",
    "fails in the factors": "the factors must be finite, found NaN or infinity in those of rank",
    "fails in the swap": "MemoryError: no room for the layers",
    "fails in the wrapping": "MemoryError: no room for the buckets",
    "fails in the buffers": "MemoryError: no room for the buffers",
    "interrupted": "KeyboardInterrupt: ",
}
"""Case -> what rank 1 fails with."""
OTHERS = [
    *("averages of other bits", "averages on one rank", "momentum of other bits"),
    *("double", "buffers", "fails to agree", "fails apart", "resume", "logs", "batches of other sizes", "uncountable"),
    *("network that talks", "fsdp2", "auto", "gentle refit", "timed", "full disk"),
]
needs_fork = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, a process that has trained cannot be forked"
)


def run(command, folder):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ran(request, tmp_path_factory):
    """Run all cases in one launch; return the folder of what the ranks wrote, and their number."""
    folder = tmp_path_factory.mktemp("ddp")
    launch = [] if request.param == 2 else [*TORCHRUN, "--nproc_per_node=3"]  # two are started by Lightning itself
    run([*launch, str(RUN), str(folder), *TRAINED, *FAILED, *OTHERS, "ddp"], folder)
    return folder, request.param


@pytest.fixture
def read(ran):
    """Return a reader of what each rank wrote about a case."""
    folder, size = ran
    return lambda case: [json.loads((folder / f"{case}-{rank}.json").read_text("utf-8")) for rank in range(size)]


def all_same(found, *keys):
    return all(one[key] == found[0][key] for one in found for key in keys)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.situation("Strategies", text, "works")) for case, text in TRAINED.items()],
    ids=list(TRAINED),
)
def test_every_rank_has_the_same_averaged_gradients_and_weights_after_every_step(ran, read, case):
    found = read(case)
    assert all_same(found, "grads", "weights", "sizes", "factorized")
    assert found[0]["factorized"]
    first, second, third = (found[0]["sizes"][epoch * STEPS[ran[1]]] for epoch in (0, 1, 3))
    assert first > second > third
    steps = len(found[0]["grads"])
    assert steps == 4 * STEPS[ran[1]] // {"accumulation": 2, "gradients gathered over a cut": 5}.get(case, 1)
    assert len(set(found[0]["grads"])) == steps <= len(set(found[0]["weights"]))


@pytest.mark.situation("Other callbacks", "DDP, EMAWeightAveraging", "works")
def test_averages_are_the_same_on_every_rank_whatever_its_own_bits(read):
    found = read("averages of other bits")
    assert all_same(found, "weights", "averages")
    assert len(set(found[0]["averages"])) == len(found[0]["averages"]) >= 4
    assert [one["turned"] for one in found] == [True] * len(found)


def test_teacher_is_the_same_on_every_rank_whatever_its_own_statistics(read):
    found = read("distilled")
    assert len({one["own"][0] for one in found}) == len(found)
    assert all_same(found, "teacher")


@pytest.mark.situation("Strategies", "DDP, when='auto'", "works")
def test_ranks_that_wait_for_the_spectra_cut_in_the_same_epoch(read):
    found = read("auto")
    assert all_same(found, "weights", "sizes", "applied", "ranks")
    assert len(found[0]["applied"]) == 1 and len(found[0]["ranks"]) == 3 and found[0]["factorized"]


def test_where_one_rank_cannot_be_calibrated_a_gentle_refit_is_left_out_on_all(read):
    found = read("gentle refit")
    assert all_same(found, "grads", "weights")
    assert [one["warned"] for one in found] == [2] + [0] * (len(found) - 1), "at each of two cuts"


def test_snapshot_that_one_rank_cannot_write_is_left_out_on_all_and_said_once(read):
    found = read("full disk")
    assert all_same(found, "grads", "weights", "sizes", "factorized")
    assert found[0]["factorized"] and found[0]["left"] == []
    assert [len(one["said"]) for one in found] == [1] + [0] * (len(found) - 1)
    assert "OSError: [Errno 28] No space left on device" in found[0]["said"][0]
    assert [one["snapshots"] for one in found] == [{}] * len(found)


def test_averages_that_not_all_ranks_have_are_refused_on_all(read):
    found = read("averages on one rank")
    counts = [2] + [0] * (len(found) - 1)
    for one in found:
        assert one["error"].startswith("RuntimeError: LowRankCompression: the averages of the weights must be the same")
        assert f"they are not: {counts} tensors on ranks 0 to {len(found) - 1}" in one["error"]


def test_projected_momentum_is_the_same_on_every_rank_whatever_its_own_bits(read):
    found = read("momentum of other bits")
    assert all_same(found, "weights", "states")
    assert [one["turned"] for one in found] == [True] * len(found)


def test_powersgd_begins_anew_with_the_buckets_of_the_new_model(ran, read):
    (found, *_) = read("PowerSGD hook")
    assert found["remembers"] == [0]
    assert found["iter"] == STEPS[ran[1]], "of the last epoch alone, which began with a cut"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.situation("Strategies", "DDP against one process with batches of the whole size", "works")
def test_several_processes_train_as_one_with_batches_of_the_whole_size(ran, read, ddp_run):
    found = read("double")
    alone = ddp_run.double(1, ran[1], strategy="auto")
    assert found[0]["sizes"] == alone["sizes"]
    for name, values in alone["dense"].items():
        assert found[-1]["dense"][name] == pytest.approx(values, rel=1e-6, abs=1e-9), name


def test_statistics_that_each_rank_keeps_for_itself_stay_its_own(read):
    found = read("buffers")
    assert all(one["applied"] == [1] and one["buffers"][0] == one["buffers"][1] for one in found)
    assert len({one["buffers"][0] for one in found}) == len(found)


@pytest.mark.parametrize(("case", "text"), FAILED.items(), ids=list(FAILED))
@pytest.mark.situation("Strategies", "DDP, a rank fails in a cut: all stop with its error", "works")
def test_rank_that_fails_makes_all_fail_with_its_error(read, case, text):
    for rank, one in enumerate(read(case)):
        own = (
            "" if rank == 1 else "RuntimeError: Another process of this run has failed, so this one stops too. rank 1: "
        )
        assert one["error"].startswith(own)
        assert text in one["error"]


@pytest.mark.parametrize("case", ["fails in the swap", "fails in the wrapping", "fails in the buffers", "interrupted"])
def test_after_a_cut_that_failed_the_run_can_go_on_as_it_was(ran, read, case):
    found = read(case)
    assert all(one["same"] == [True, True, True] for one in found), "wrapper, weights and optimizer, gradients"
    assert all_same(found, "grads", "weights", "sizes")
    assert len(found[0]["grads"]) == 4 * STEPS[ran[1]]
    assert found[0]["sizes"][2 * STEPS[ran[1]]] < found[0]["sizes"][STEPS[ran[1]]] == found[0]["sizes"][0]


@pytest.mark.situation("Strategies", "DDP, ranks that decide differently", "refused")
def test_ranks_that_decide_differently_all_stop(read):
    found = read("fails to agree")
    others = ", ".join(["None"] * (len(found) - 1))
    for one in found:
        assert (
            f"`should_compress` must return the same on every process of the run, got [0.5, {others}]" in one["error"]
        )
        assert "sync_dist=True" in one["error"]


@pytest.mark.situation("Strategies", "DDP, weights that have come apart before a cut", "refused")
def test_weights_that_have_come_apart_are_refused(read):
    for one in read("fails apart"):
        text = "the weights must be the same on all {} processes before a compression, those of network.4.weight differ"
        assert text.format(len(read("fails apart"))) in one["error"]


@pytest.mark.situation("Strategies", "DDP, a network that talks to its copies in its forward", "works")
def test_network_that_talks_to_its_copies_is_counted_and_cut(read):
    found = read("network that talks")
    assert all_same(found, "weights", "sizes")
    assert all(one["counted"] > 0 and one["factorized"] for one in found)


@pytest.mark.situation("Checkpoints", "DDP, crash and resume", "works")
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(read):
    for one in read("resume"):
        assert one["equal"] == [True] * 4
        assert one["error"].startswith("Broken")


@pytest.mark.situation("Checkpoints", "DDP, trainer.test(ckpt_path) of a file from before and after a cut", "works")
def test_files_from_before_and_after_a_cut_are_tested(read):
    found = read("resume")
    assert all_same(found, "tested")
    (dense,), (cut,) = found[0]["tested"]
    assert dense["test_loss"] != cut["test_loss"]


@pytest.mark.situation("Other callbacks", "DDP, ModelCheckpoint", "works")
def test_one_rank_logs_prints_and_writes_what_is_the_same_on_all(read):
    found = read("logs")
    assert all_same(found, "metrics", "best", "snapshots", "tested")
    assert [one["tables"] for one in found] == [2] + [0] * (len(found) - 1)
    assert found[0]["metrics"]["compression/seconds"] > 0
    assert 0 < found[0]["metrics"]["compression/kept_multiply_adds"] < 1
    assert sorted(found[0]["snapshots"]) == ["cut", "dense"]
    assert not any(one["own_folder"] for one in found)


def test_budget_in_multiply_adds_is_one_for_ranks_with_batches_of_other_sizes(read):
    found = read("batches of other sizes")
    assert all_same(found, "grads", "weights", "allocation")
    assert found[0]["allocation"]["unit"] == "multiply_adds"


@pytest.mark.situation("Goals", "a budget in measured time, on several processes", "works")
def test_budget_in_time_is_chosen_by_what_the_first_rank_measured(read):
    found = read("timed")
    assert all_same(found, "grads", "weights", "allocation")
    assert found[0]["allocation"]["unit"] == "latency"
    assert any(layer is not None for layer in found[0]["allocation"]["layers"].values())


def test_network_that_one_rank_cannot_run_again_is_compressed_all_the_same(read):
    found = read("uncountable")
    assert all_same(found, "grads", "weights")
    assert [one["warned"] for one in found] == [1] + [0] * (len(found) - 1)


@pytest.mark.situation("Strategies", "FSDP2 (ModelParallelStrategy), compressed in configure_model", "works")
@pytest.mark.parametrize("way", ["cut", "restored"])
def test_model_that_was_compressed_in_configure_model_is_sharded_and_trained(read, way):
    found = [one[way] for one in read("fsdp2")]
    assert all_same(found, "weights", "shapes")
    assert found[0]["kinds"] == ["DTensor"]
    assert len(set(found[0]["weights"])) == len(found[0]["weights"]) > 6
    assert [24, 128] not in found[0]["shapes"], "the wide layer is in two"
    reasons = {"cut": "FSDPConv2d is not among the layer types", "restored": "its weight is sharded over processes"}
    assert found[0]["skipped"]["0"].startswith(reasons[way])


@pytest.mark.situation("Strategies", "FSDP2 (ModelParallelStrategy), the callback", "refused")
def test_callback_is_refused_under_fsdp2(read):
    for one in read("fsdp2"):
        assert "ModelParallelStrategy: it holds the parameters as shards" in one["error"]
        assert "Train with strategy='ddp'; or leave this callback out, and compress in" in one["error"]


@pytest.fixture
def ddp_run(monkeypatch):
    """Return the script as a module."""
    monkeypatch.syspath_prepend(RUN.parent)
    return importlib.import_module("ddp_run")


def check_caller(folder, name):
    first, caller = (json.loads((folder / f"{name}-{who}.json").read_text("utf-8")) for who in (0, "caller"))
    assert caller["end"] == first["end"]
    assert caller["factorized"]
    assert (folder / f"{name}-1.json").is_file()


@pytest.mark.situation("Strategies", "ddp, started by Lightning or torchrun", "works")
def test_first_process_of_ddp_holds_the_compressed_weights(ran):
    check_caller(ran[0], "ddp")


@pytest.mark.situation("Strategies", "ddp_spawn, prepared", "works")
def test_process_that_spawned_the_others_holds_the_compressed_weights(tmp_path):
    run([str(RUN), str(tmp_path), "ddp_spawn"], tmp_path)
    check_caller(tmp_path, "ddp_spawn")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ddp_fork", marks=pytest.mark.situation("Strategies", "ddp_fork, prepared", "works")),
        pytest.param("ddp_notebook", marks=pytest.mark.situation("Strategies", "ddp_notebook, prepared", "works")),
    ],
)
def test_process_that_forked_the_others_holds_the_compressed_weights(tmp_path, ddp_run, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [str(RUN), str(tmp_path), name])
    ddp_run.launched(name)
    check_caller(tmp_path, name)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.situation("Strategies", "ddp_spawn, ddp_fork, ddp_notebook, not prepared", "refused")
@pytest.mark.parametrize("name", ["ddp_fork", "ddp_notebook"])
def test_module_of_the_caller_that_is_not_prepared_is_refused(ddp_run, name):
    trainer = ddp_run.trainer(ddp_run.events(), strategy=name, devices=2)
    match = r"(?s)MisconfigurationException.*Call `lr_callback.prepare\(module\)` before `trainer.fit\(module\)`"
    with pytest.raises(Exception, match=match):
        trainer.fit(ddp_run.Module(), ddp_run.loader(), ddp_run.loader())
