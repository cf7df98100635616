"""Strategies, launchers and precision plugins: which are refused, why, and what to do instead."""

from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.host.strategies import check_strategy, processes_of


def bare(kind):
    """Return an object of a class that cannot be made without its hardware or package."""
    return kind.__new__(kind)


def host(strategy, world_size=2, precision=None):
    """Return what is asked of a Trainer before a run starts."""
    strategy._launcher = None
    return SimpleNamespace(strategy=strategy, world_size=world_size, precision_plugin=precision or Precision())


class OwnFSDP(FSDPStrategy):
    """What another package makes of FSDP."""


SHARDED = {
    FSDPStrategy: "FSDPStrategy: it holds all parameters as shards of flat ones",
    OwnFSDP: r"OwnFSDP \(a FSDPStrategy\): it holds all parameters as shards of flat ones",
    ModelParallelStrategy: "ModelParallelStrategy: it holds the parameters as shards",
    DeepSpeedStrategy: "DeepSpeedStrategy: its engine holds the parameters in flat buffers",
    XLAStrategy: "XLAStrategy: XLA reduces the gradients itself",
}
NAMES = {FSDPStrategy: "FSDP", ModelParallelStrategy: "FSDP2", DeepSpeedStrategy: "DeepSpeed", XLAStrategy: "XLA"}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        pytest.param(kind, why, marks=pytest.mark.situation("Strategies", f"{NAMES.get(kind, 'FSDP')}", "refused"))
        for kind, why in SHARDED.items()
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_sharded_strategy_is_refused_with_the_ways_out_also_on_one_device(kind, why, world_size):
    ways = r".*Train with strategy='ddp'; or .* in the module's `configure_model`.*factorize_.*restore_\(net, path\)"
    with pytest.raises(MisconfigurationException, match=f"^LowRankCompression: {why}{ways}"):
        check_strategy(host(bare(kind), world_size), LightningModule())


@pytest.mark.situation("Strategies", "a strategy on several processes that is not DDP", "refused")
def test_unknown_strategy_on_several_processes_is_refused():
    class Elsewhere(ParallelStrategy):
        pass

    Elsewhere.__abstractmethods__ = frozenset()
    with pytest.raises(
        MisconfigurationException, match=r"Elsewhere on 2 processes: .* must be DDPStrategy or a subclass"
    ):
        check_strategy(host(bare(Elsewhere)), LightningModule())
    check_strategy(host(bare(Elsewhere), world_size=1), LightningModule())


@pytest.mark.situation("Strategies", "DDP with PostLocalSGD", "refused")
def test_local_sgd_is_refused():
    strategy = DDPStrategy(ddp_comm_state=PostLocalSGDState(None, None, 4), model_averaging_period=2)
    with pytest.raises(MisconfigurationException, match=r"PostLocalSGDState.*gradients must be averaged .* every step"):
        check_strategy(host(strategy), LightningModule())


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        pytest.param(
            TransformerEnginePrecision,
            "it converts Linear layers when a run starts",
            marks=pytest.mark.situation("Precision", "transformer-engine", "refused"),
        ),
        pytest.param(
            BitsandbytesPrecision,
            "it quantizes Linear layers when a run starts",
            marks=pytest.mark.situation("Precision", "bitsandbytes", "refused"),
        ),
    ],
)
def test_precision_that_exchanges_layers_is_refused(plugin, why):
    trainer = host(bare(SingleDeviceStrategy), 1, bare(plugin))
    match = f"^LowRankCompression: {plugin.__name__}: {why}.*precision='bf16-mixed'"
    with pytest.raises(MisconfigurationException, match=match):
        check_strategy(trainer, LightningModule())


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_child_processes_need_a_prepared_module(name):
    trainer, compression = Trainer(accelerator="cpu", devices=2, strategy=name, logger=False), LowRankCompression()
    with pytest.raises(MisconfigurationException, match=r"Call `lr_callback.prepare\(module\)` before `trainer.fit"):
        compression.setup(trainer, LightningModule(), "fit")
    compression.setup(trainer, lrc.prepare(LightningModule()), "fit")


def test_refused_module_gets_no_hook_that_would_let_it_pass_the_next_time():
    trainer, module = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False), LightningModule()
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="prepare"):
            LowRankCompression().setup(trainer, module, "fit")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_nothing_is_refused_where_nothing_is_trained(stage):
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    LowRankCompression().setup(trainer, LightningModule(), stage)


def test_ddp_of_any_kind_is_taken():
    class RayDDPStrategy(DDPStrategy):
        pass

    for strategy in (DDPStrategy(), RayDDPStrategy(find_unused_parameters=True)):
        check_strategy(host(strategy), LightningModule())


def test_processes_are_those_of_the_trainer():
    assert processes_of(SimpleNamespace(global_rank=2, world_size=3)).rank == 2
    assert processes_of(Trainer(accelerator="cpu", devices=1, logger=False)).size == 1
