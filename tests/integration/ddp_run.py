"""Runs of a Trainer on several processes, one after another; each process writes what it saw.

    python -m torch.distributed.run --standalone --nproc_per_node=2 ddp_run.py FOLDER CASE [CASE ...]
    python ddp_run.py FOLDER ddp_spawn

Process ``r`` writes ``FOLDER/CASE-r.json`` for each case. In the second form Lightning starts two processes. A case
that is the name of a strategy is trained with that, and the process that called ``fit`` writes what it has in the end
to ``FOLDER/CASE-caller.json``.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lr_callback as lrc
from lr_callback import LowRankCompression, build, cut
from lr_callback.find import find_layers
from lr_callback.layers import FactorizedLayer

BATCH = 4
EPOCHS = 4
RANK = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
SIZE = int(os.environ.get("WORLD_SIZE", "2"))


def data(size: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 2, 4, 4, generator=generator)
    return TensorDataset(images, torch.randint(4, (size,), generator=generator))


def network(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )


class Module(LightningModule):
    """A small network; ``now_and_then`` has a branch that only every second batch uses."""

    def __init__(
        self, manual: bool = False, now_and_then: bool = False, norm: bool = False, adam: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.network = network(norm)
        self.adam = adam
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.branch = nn.Linear(32, 4) if now_and_then else None

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        scores = self(batch[0])
        if self.branch is not None and batch_idx % 2:
            scores = scores + self.branch(batch[0].flatten(1))
        loss = F.cross_entropy(scores, batch[1])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        made = Adam(self.parameters(), lr=0.01) if self.adam else SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": made, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(made, 0.9)}


def digest(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """Return a fingerprint of every bit."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(name.encode())
        if tensor is not None:
            total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def of_state(value: Any) -> Any:
    """Return nested dicts and lists with tensors replaced by their fingerprints."""
    if isinstance(value, Tensor):
        return digest([("", value)])
    if isinstance(value, dict):
        return {str(key): of_state(one) for key, one in value.items()}
    return [of_state(one) for one in value] if isinstance(value, (list, tuple)) else value


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


class Watch(Callback):
    """Take fingerprints of all gradients before each step and of all weights after each batch."""

    def __init__(self) -> None:
        self.grads: list[str] = []
        self.weights: list[str] = []
        self.sizes: list[int] = []
        self.messages: list[str] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.grads.append(digest((name, one.grad) for name, one in pl_module.named_parameters()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.weights.append(digest(pl_module.named_parameters()))
        self.sizes.append(sum(one.numel() for one in pl_module.parameters()))

    def seen(self, module: nn.Module) -> dict[str, Any]:
        factorized = [name for name, one in module.named_modules() if isinstance(one, FactorizedLayer)]
        return {"grads": self.grads, "weights": self.weights, "sizes": self.sizes, "factorized": factorized}


class OnEpoch(Callback):
    """Do something at the start of an epoch."""

    def __init__(self, epoch: int, do: Callable[[Trainer, LightningModule], None]) -> None:
        self.epoch, self.do = epoch, do

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.do(trainer, pl_module)


def trainer(*callbacks: Callback, strategy: Any = None, **settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": SIZE,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
        "strategy": DDPStrategy() if strategy is None else strategy,
    }
    return Trainer(**{**quiet, **settings})


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": BATCH, **settings})


def events(**settings: Any) -> LowRankCompression:
    return LowRankCompression([0.6, 0.35], [1, 3], **{"show_table": False, **settings})


def run(
    *callbacks: Callback,
    module: Module | None = None,
    compression: Callback | None = None,
    batches: DataLoader[Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with two compressions and return what was seen."""
    module, watch = module or Module(), Watch()
    host = trainer(watch, *callbacks, compression or events(), **settings)
    host.fit(module, loader() if batches is None else batches)
    return watch.seen(module)


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


@contextmanager
def patched(where: object, name: str, value: object):
    old = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, old)


def other_signs() -> dict[str, Any]:
    """Let each rank find factors of another sign, as exact as the others', and DDP not make them the same."""
    factors = build.factors

    def turned(*arguments: Any) -> tuple[Tensor, Tensor]:
        encoder, decoder = factors(*arguments)
        return ((-1) ** RANK * encoder, (-1) ** RANK * decoder)

    with patched(build, "factors", turned):
        return run(strategy=DDPStrategy(init_sync=False))


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


class FailsOn(lrc.ALDS):
    """ALDS that fails on one rank."""

    def candidates(self, *arguments: Any) -> Any:
        if RANK == 1:
            raise ArithmeticError("no convergence")
        return super().candidates(*arguments)


def failure(act: Callable[[], object]) -> dict[str, Any]:
    try:
        act()
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def fails_in_analysis() -> dict[str, Any]:
    return failure(lambda: run(compression=events(method=FailsOn())))


def fails_with_nan() -> dict[str, Any]:
    def spoil(host: Trainer, module: LightningModule) -> None:
        if RANK == 1:
            with torch.no_grad():
                module.network[4].weight[0, 0] = torch.nan

    return failure(lambda: run(OnEpoch(1, spoil)))


def fails_in_factors() -> dict[str, Any]:
    factors = build.factors

    def spoilt(*arguments: Any) -> tuple[Tensor, Tensor]:
        encoder, decoder = factors(*arguments)
        return (encoder * torch.nan, decoder) if RANK == 1 else (encoder, decoder)

    with patched(build, "factors", spoilt):
        return failure(run)


class Undecided(LowRankCompression):
    """A callback that decides on what only its own rank knows."""

    def should_compress(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        return 0.5 if trainer.current_epoch == 1 and RANK == 0 else None


def fails_to_agree() -> dict[str, Any]:
    return failure(lambda: run(compression=Undecided(show_table=False)))


def goes_on_after(patch: Callable[[Trainer], Any]) -> dict[str, Any]:
    """Let a cut fail on one rank in the middle, catch that, and train on with what was put back."""
    errors: list[str] = []
    same: list[bool] = []

    def attempt(host: Trainer, module: LightningModule) -> None:
        wrapper, before = host.strategy.model, of_state([module.state_dict(), host.optimizers[0].state_dict()])
        grads = digest((name, one.grad) for name, one in module.named_parameters())
        with patch(host):
            errors.append(failure(lambda: LowRankCompression(0.5, 1).compress(host, module, 0.5))["error"])
        same.append(host.strategy.model is wrapper)
        same.append(of_state([module.state_dict(), host.optimizers[0].state_dict()]) == before)
        same.append(digest((name, one.grad) for name, one in module.named_parameters()) == grads)

    views = DDPStrategy(gradient_as_bucket_view=True)
    found = run(OnEpoch(1, attempt), compression=LowRankCompression(0.5, 2, show_table=False), strategy=views)
    return {**found, "error": errors[0], "same": same}


def fails_in_swap() -> dict[str, Any]:
    def broken(*arguments: Any) -> None:
        raise MemoryError("no room for the layers")

    return goes_on_after(lambda host: patched(cut, "replace_layers", broken if RANK == 1 else cut.replace_layers))


def fails_in_wrapping() -> dict[str, Any]:
    def patch(host: Trainer) -> Any:
        whole = host.strategy.configure_ddp

        def broken() -> None:
            whole()
            if RANK == 1:
                raise MemoryError("no room for the buckets")

        return patched(host.strategy, "configure_ddp", broken)

    return goes_on_after(patch)


def double(**settings: Any) -> dict[str, Any]:
    """Train in float64, to be compared with one process and batches of the whole size."""
    torch.set_default_dtype(torch.float64)
    try:
        module = Module(adam=True)
        in_order = loader(sampler=DistributedSampler(data(), SIZE, RANK, shuffle=False))
        found = run(module=module, batches=in_order, precision="64-true", **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    return {**found, "dense": dense_weights(module)}


def dense_weights(module: nn.Module) -> dict[str, list[float]]:
    lrc.densify_(module)
    return {name: one.detach().flatten().tolist() for name, one in module.named_parameters()}


class Broken(Exception):
    """What ends a run early."""


def resume() -> dict[str, Any]:
    """Compare a run to the end with runs that were resumed from its files, and one that broke off."""
    root = Path(sys.argv[1]) / "resume"

    def files(name: str, **when: Any) -> ModelCheckpoint:
        return ModelCheckpoint(root / name, "{epoch}-{step}", save_top_k=-1, **when)

    def end(*callbacks: Callback, path: Path | None = None) -> Any:
        module = Module(adam=True)
        # DDP orders its buckets anew after a wrapper's first step, unless it looks for unused parameters. On three or
        # more processes the sum of a gradient depends on its place in a bucket: Lightning alone would resume inexactly.
        host = trainer(
            events(),
            *callbacks,
            strategy=DDPStrategy(find_unused_parameters=True),
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        )
        host.fit(module, loader(shuffle=False), ckpt_path=path)
        return of_state([module.state_dict(), host.optimizers[0].state_dict()])

    def stop(host: Trainer, module: LightningModule) -> None:
        raise Broken

    steps = len(loader()) // SIZE
    whole = end(files("whole"))
    broke = failure(lambda: end(files("broken"), OnEpoch(2, stop)))
    names = [root / "whole" / f"epoch={epoch}-step={(epoch + 1) * steps}.ckpt" for epoch in range(3)]
    resumed = [end(path=path) for path in (*names, root / "broken" / names[1].name)]
    tested = [
        trainer(events()).test(Module(), loader(), ckpt_path=path, verbose=False) for path in (names[0], names[2])
    ]
    return {"equal": [one == whole for one in resumed], "error": broke["error"], "tested": tested, "end": whole}


class Kept(logging.Handler):
    """Keep the messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def logs() -> dict[str, Any]:
    """Log, print and write on rank zero only, the same values on all."""
    kept, said = Kept(), logging.getLogger("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).addHandler(kept)
    assert said.isEnabledFor(logging.INFO)
    root = Path(sys.argv[1]) / f"logs-{RANK}"
    best = ModelCheckpoint(monitor="val_loss")
    host = trainer(
        events(show_table=True, snapshots=True),
        best,
        logger=CSVLogger(Path(sys.argv[1]) / "logs"),
        enable_checkpointing=True,
        default_root_dir=root,
    )
    host.fit(Module(), loader(), loader())
    (compression,) = [one for one in host.callbacks if isinstance(one, LowRankCompression)]
    metrics = {name: float(value) for name, value in host.callback_metrics.items() if name.startswith("compression")}
    tables = [text for text in kept.texts if "Low-rank compression at the start" in text]
    tested = host.test(dataloaders=loader(), ckpt_path="best", verbose=False)
    return {
        "metrics": metrics,
        "tables": len(tables),
        "best": Path(best.best_model_path).name,
        "snapshots": compression.snapshot_files,
        "tested": tested,
        "own_folder": root.exists(),
    }


def uneven() -> dict[str, Any]:
    """Count multiply-adds where each rank has batches of another size."""
    module, watch, compression = Module(), Watch(), events(cost="multiply_adds")
    sampled = loader(batch_size=BATCH - RANK, sampler=range(RANK, 12))
    host = trainer(watch, compression, use_distributed_sampler=False, limit_train_batches=3)
    host.fit(module, sampled)
    assert compression.allocation is not None
    return {**watch.seen(module), "allocation": compression.allocation.to_dict()}


class OnlyInTraining(Module):
    """A network that cannot be run in eval mode on one rank."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and RANK == 0:
            raise ValueError("not now")
        return super().forward(images)


def uncountable() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(module=OnlyInTraining())
    return {**found, "warned": sum("multiply-adds are not reported" in str(one.message) for one in caught)}


class Sharded(Module):
    """Compress before the parameters are sharded: the way out for FSDP2."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path = path

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if any(isinstance(one, FactorizedLayer) for one in self.network):
            return
        if self.path is None:
            lrc.factorize_(self.network, lrc.allocate(self.network, 0.5))
        else:
            lrc.restore_(self.network, self.path)
        mesh = self.device_mesh["data_parallel"]
        for layer in self.network:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05, momentum=0.9)


class Whole(Callback):
    """Put the shards together after each batch, and take a fingerprint."""

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.kinds: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.kinds |= {type(one.data).__name__ for one in pl_module.parameters()}
        self.weights.append(digest((name, one.full_tensor()) for name, one in pl_module.named_parameters()))


def fsdp2() -> dict[str, Any]:
    def shards() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=SIZE, tensor_parallel_size=1, save_distributed_checkpoint=False)

    path = Path(sys.argv[1]) / "dense-cut.ckpt"
    if RANK == 0:
        model = network()
        lrc.factorize_(model, lrc.allocate(model, 0.4))
        torch.save({"state_dict": model.state_dict()}, path)
    found: dict[str, Any] = {}
    for name, source in (("cut", None), ("restored", path)):
        whole = Whole()
        module = Sharded(source)
        trainer(whole, strategy=shards(), max_epochs=2).fit(module, loader())
        torch.distributed.barrier()
        shapes = [list(one.shape) for one in module.network.parameters()]
        skipped = find_layers(module.network).skipped
        found[name] = {"weights": whole.weights, "kinds": sorted(whole.kinds), "shapes": shapes, "skipped": skipped}
    refused = failure(lambda: trainer(events(), strategy=shards()).fit(Module(), loader()))
    return {**found, "error": refused["error"]}


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
    "clipping": lambda: run(gradient_clip_val=0.1),
    "factors of other signs": other_signs,
    "double": double,
    "buffers": buffers,
    "fails in the analysis": fails_in_analysis,
    "fails with NaN": fails_with_nan,
    "fails in the factors": fails_in_factors,
    "fails to agree": fails_to_agree,
    "fails in the swap": fails_in_swap,
    "fails in the wrapping": fails_in_wrapping,
    "resume": resume,
    "logs": logs,
    "batches of other sizes": uneven,
    "uncountable": uncountable,
    "fsdp2": fsdp2,
}


class AtEnd(Callback):
    """Write what the module of a process is like at the end of its training."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write(self.name, trainer.global_rank, {"end": digest(pl_module.state_dict().items())})


def launched(name: str) -> None:
    """Train on two processes that Lightning starts by itself, and see what the caller has at the end."""
    module = lrc.prepare(Module(norm=True))
    trainer(events(), AtEnd(name), strategy=name, devices=2).fit(module, loader(), loader())
    factorized = [each for each, one in module.named_modules() if isinstance(one, FactorizedLayer)]
    if RANK == 0:
        write(name, "caller", {"end": digest(module.state_dict().items()), "factorized": factorized})


def write(name: str, who: object, found: dict[str, Any]) -> None:
    (Path(sys.argv[1]) / f"{name}-{who}.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    pl.seed_everything(0, verbose=False)
    for name in sys.argv[2:]:
        faulthandler.dump_traceback_later(50, exit=True)  # a rank that waits forever says where
        if name in CASES:
            write(name, RANK, CASES[name]())
        else:
            launched(name)


if __name__ == "__main__":
    main()
