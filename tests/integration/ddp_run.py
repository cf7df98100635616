"""Runs of a Trainer on several processes, one after another; each process writes what it saw.

    python -m torch.distributed.run --standalone --nproc_per_node=2 ddp_run.py FOLDER CASE [CASE ...]
    python ddp_run.py FOLDER ddp_spawn

Process ``r`` writes ``FOLDER/CASE-r.json`` for each case. In the second form Lightning starts two processes. A case
that is the name of a strategy is trained with that, and the process that called ``fit`` writes what it has in the end
to ``FOLDER/CASE-caller.json``.
"""

from __future__ import annotations

import copy
import faulthandler
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import ddp_failures
import ddp_files
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from ddp_parts import (
    BATCH,
    RANK,
    SIZE,
    Module,
    OnEpoch,
    Watch,
    data,
    digest,
    events,
    failure,
    loader,
    of_state,
    patched,
    run,
    trainer,
    write,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.edits import averages, build, projection
from lr_callback.layers import FactorizedLayer


class Gathers(Module):
    """Step at every fifth batch only, so that gradients are gathered over the start of an epoch, and over a cut."""

    def __init__(self) -> None:
        super().__init__(manual=True)
        self.batches = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.batches += 1
        if self.batches % 5 == 0:
            optimizer.step()
            optimizer.zero_grad()


def hook(make_state: Callable[[], object], function: Callable[..., Any]) -> Callback:
    """Register a communication hook; Lightning does it on CUDA only."""

    def register(host: Trainer, module: LightningModule) -> None:
        wrapper = host.strategy.model
        wrapper.register_comm_hook(make_state(), function)

    return OnEpoch(0, register)


def power() -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3, min_compression_rate=1)


def powersgd() -> dict[str, Any]:
    states: list[powerSGD_hook.PowerSGDState] = []

    def note(host: Trainer, module: LightningModule) -> None:
        ((_, state),) = host.strategy.model._comm_hooks
        states.append(state)

    # One bucket: with several, what the hook sends from its callbacks may cross between ranks on gloo, cut or no cut.
    found = run(hook(power, powerSGD_hook.powerSGD_hook), OnEpoch(3, note))
    return {**found, "remembers": sorted(states[0].error_dict), "iter": states[0].iter}


def other_signs() -> dict[str, Any]:
    """Let each rank find factors of another sign, as exact as the others', and DDP not make them the same."""
    factors = build.factors

    def turned(*arguments: Any) -> tuple[Tensor, Tensor]:
        encoder, decoder = factors(*arguments)
        return ((-1) ** RANK * encoder, (-1) ** RANK * decoder)

    with patched(build, "factors", turned):
        return run(strategy=DDPStrategy(init_sync=False))


def other_averages() -> dict[str, Any]:
    """Let each rank find other decoders for its average."""
    nearest, turned, noted = averages.nearest_decoder, [], []

    def moved(*arguments: Any) -> Tensor:
        turned.append(True)
        return nearest(*arguments) * (1 + RANK / 64)

    class Average(EMAWeightAveraging):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any, **named: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest, **named)
            noted.append(digest(self._average_model.module.named_parameters()))

    with patched(averages, "nearest_decoder", moved):
        return {**run(Average(decay=0.9)), "averages": noted, "turned": any(turned)}


class OnOneRank(LowRankCompression):
    """A callback that finds an average on the first rank only."""

    def averages(self, trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
        return [copy.deepcopy(pl_module.network)] if RANK == 0 and trainer.current_epoch == 1 else []


def other_momentum() -> dict[str, Any]:
    """Let each rank project a momentum of its own."""
    gradient, turned, states = projection.project_gradient, [], []

    def moved(*arguments: Any) -> tuple[Tensor, Tensor]:
        turned.append(True)
        of_encoder, of_decoder = gradient(*arguments)
        return of_encoder * (1 + RANK / 64), of_decoder

    def note(host: Trainer, module: LightningModule) -> None:
        states.append(of_state(host.optimizers[0].state_dict()["state"]))

    with patched(projection, "project_gradient", moved):
        found = run(OnEpoch(3, note), module=Module(adam=True), compression=events(optimizer_state="project"))
    return {**found, "states": states, "turned": any(turned)}


def buffers() -> dict[str, Any]:
    """Let each rank keep batch norm's statistics for itself; the newer setting makes them equal at the start alone."""
    newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    apart = DDPStrategy(**{"forward_sync_buffers" if newer else "broadcast_buffers": False})
    taken: list[str] = []

    def note(host: Trainer, module: LightningModule) -> None:
        taken.append(digest(module.named_buffers()))

    module, compression = Module(norm=True), events()
    host = trainer(OnEpoch(1, note), compression, OnEpoch(1, note), strategy=apart, max_epochs=2)
    host.fit(module, loader())
    return {"buffers": taken, "applied": compression.state_dict()["applied"]}


def double(size: int = SIZE, parts: int = SIZE, **settings: Any) -> dict[str, Any]:
    """Train in float64, to be compared with one process and batches of the whole size."""
    torch.set_default_dtype(torch.float64)
    try:
        module = Module(adam=True)
        batch = BATCH * parts // size
        in_order = loader(batch_size=batch, sampler=DistributedSampler(data(), size, RANK, shuffle=False))
        found = run(module=module, batches=in_order, precision="64-true", devices=size, **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    return {**found, "dense": dense_weights(module)}


def dense_weights(module: nn.Module) -> dict[str, list[float]]:
    lrc.densify_(module)
    return {name: one.detach().flatten().tolist() for name, one in module.named_parameters()}


def uneven() -> dict[str, Any]:
    """Count multiply-adds where each rank has batches of another size."""
    module, watch, compression = Module(), Watch(), events(cost="multiply_adds")
    sampled = loader(batch_size=BATCH - RANK, sampler=range(RANK, 12))
    host = trainer(watch, compression, use_distributed_sampler=False, limit_train_batches=3)
    host.fit(module, sampled)
    assert compression.allocation is not None
    return {**watch.seen(module), "allocation": compression.allocation.to_dict()}


def timed() -> dict[str, Any]:
    """Choose by time, which each rank measures for itself."""
    module, watch = Module(), Watch()
    torch.manual_seed(4)
    wide = nn.Linear(1024, 1024)
    module.network = nn.Sequential(nn.Flatten(), nn.Linear(32, 1024), nn.ReLU(), wide, nn.ReLU(), nn.Linear(1024, 4))
    compression = LowRankCompression(0.8, 1, cost="latency", method=lrc.ALDS(slices=[1]), refit=None, show_table=False)
    trust = sys.modules["lr_callback.units.latency.trust"]
    # The ranks share cores, and disturb each other.
    with warnings.catch_warnings(), patched(trust, "SPREAD_REFUSED", float("inf")):
        warnings.filterwarnings("ignore", message="Latency: ")
        trainer(watch, compression, max_epochs=2).fit(module, loader())
    assert compression.allocation is not None
    return {**watch.seen(module), "allocation": compression.allocation.to_dict()}


def distilled() -> dict[str, Any]:
    """Learn from the network before the first cut, whose statistics each rank has of its own batches."""
    compression, own = events(distill=0.5), []

    def note(host: Trainer, module: LightningModule) -> None:
        own.append(digest(module.named_buffers()))

    found = run(OnEpoch(1, note), module=Module(norm=True), compression=compression)
    return {**found, "own": own, "teacher": digest(compression.state_dict()["teacher"].items())}


def automatic() -> dict[str, Any]:
    """Compress when the spectra have settled."""
    compression = LowRankCompression(0.5, when="auto", show_table=False)
    found = run(module=Module(norm=True), compression=compression)
    state = compression.state_dict()
    return {**found, "applied": state["applied"], "ranks": state["stable_ranks"]}


class OnlyInTraining(Module):
    """A network that cannot be run in eval mode on one rank."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and RANK == 0:
            raise ValueError("not now")
        return super().forward(images)


def uncountable(text: str = "multiply-adds are not reported", **settings: Any) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(module=OnlyInTraining(), **settings)
    return {**found, "warned": sum(text in str(one.message) for one in caught)}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": run,
    "find_unused_parameters": lambda: run(
        module=Module(now_and_then=True), strategy=DDPStrategy(find_unused_parameters=True)
    ),
    "static_graph": lambda: run(strategy=DDPStrategy(static_graph=True)),
    "static_graph, manual optimization": lambda: run(
        module=Module(manual=True), strategy=DDPStrategy(static_graph=True)
    ),
    "gradient_as_bucket_view": lambda: run(strategy=DDPStrategy(gradient_as_bucket_view=True)),
    "small buckets": lambda: run(strategy=DDPStrategy(bucket_cap_mb=0.002)),
    "PowerSGD hook": powersgd,
    "bf16 hook": lambda: run(hook(lambda: None, default_hooks.bf16_compress_hook)),
    "accumulation": lambda: run(accumulate_grad_batches=2),
    "manual optimization": lambda: run(module=Module(manual=True)),
    "gradients gathered over a cut": lambda: run(module=Gathers(), strategy=DDPStrategy(gradient_as_bucket_view=True)),
    "bf16-mixed": lambda: run(precision="bf16-mixed"),
    "bf16-true": lambda: run(precision="bf16-true"),
    "Adam": lambda: run(module=Module(adam=True)),
    "batch norm": lambda: run(module=Module(norm=True)),
    "repaired": lambda: run(
        module=Module(norm=True),
        compression=events(refit="cut", recalibrate_batchnorm=True, method=lrc.ALDS("activation", "sum")),
    ),
    "clipping": lambda: run(gradient_clip_val=0.1),
    "weighed by effects": lambda: run(
        module=Module(norm=True),
        compression=events(method=lrc.ALDS("activation", "loss", power=4), refit="cut", recalibrate_batchnorm=True),
    ),
    "weighed by BatchNorm": lambda: run(
        module=Module(norm=True), compression=events(method=lrc.ALDS("batchnorm", "loss"))
    ),
    "weighed by Adam": lambda: run(module=Module(adam=True), compression=events(method=lrc.ALDS("fisher", "sum"))),
    "distilled": distilled,
    "factors of other signs": other_signs,
    "averages of other bits": other_averages,
    "averages on one rank": lambda: failure(lambda: run(compression=OnOneRank(0.5, 1, method=lrc.ALDS(), refit=None))),
    "momentum of other bits": other_momentum,
    "double": double,
    "buffers": buffers,
    "batches of other sizes": uneven,
    "timed": timed,
    "uncountable": uncountable,
    "auto": automatic,
    "gentle refit": lambda: uncountable("factors are not refitted", compression=events(refit="auto")),
    **ddp_failures.CASES,
    **ddp_files.CASES,
}


class AtEnd(Callback):
    """Write what the module of a process is like at the end of its training."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write(self.name, trainer.global_rank, {"end": digest(pl_module.state_dict().items())})


def launched(name: str) -> None:
    """Train on processes that Lightning may have to start, and see what the caller has at the end."""
    module = lrc.prepare(Module(norm=True))
    trainer(events(), AtEnd(name), strategy=name).fit(module, loader(), loader())
    factorized = [each for each, one in module.named_modules() if isinstance(one, FactorizedLayer)]
    if RANK == 0:
        write(name, "caller", {"end": digest(module.state_dict().items()), "factorized": factorized})


def main() -> None:
    pl.seed_everything(0, verbose=False)
    for name in sys.argv[2:]:
        faulthandler.dump_traceback_later(120, exit=True)  # a rank that waits forever says where
        if name in CASES:
            write(name, RANK, CASES[name]())
        else:
            launched(name)


if __name__ == "__main__":
    main()
