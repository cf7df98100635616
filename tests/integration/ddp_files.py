"""Files, logs and messages of runs on several processes, and models that are sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from ddp_parts import (
    RANK,
    SIZE,
    Module,
    OnEpoch,
    Watch,
    digest,
    events,
    failure,
    folder,
    loader,
    network,
    of_state,
    trainer,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import SGD

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.layers import FactorizedLayer
from lr_callback.model.find import find_layers


class Broken(Exception):
    """What ends a run early."""


def resume() -> dict[str, Any]:
    """Compare a run to the end with runs that were resumed from its files, and one that broke off."""
    root = folder() / "resume"

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
    root = folder() / f"logs-{RANK}"
    best = ModelCheckpoint(monitor="val_loss")
    host = trainer(
        events(show_table=True, snapshots=True),
        best,
        logger=CSVLogger(folder() / "logs"),
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
        for layer in self.network if self.path is None else ():  # each by itself, or all in one
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

    path = folder() / "dense-cut.ckpt"
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


class Mean(torch.nn.Module):
    """Center on the mean over all processes, with a collective of its own."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        mean = values.detach().mean()
        torch.distributed.all_reduce(mean)
        return values - mean / SIZE


def talks() -> dict[str, Any]:
    module, callback, watch = Module(), events(), Watch()
    module.network.append(Mean())
    trainer(watch, callback).fit(module, loader())
    return {**watch.seen(module), "counted": callback._counting.observation.dense_multiply_adds}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "resume": resume,
    "logs": logs,
    "network that talks": talks,
    "fsdp2": fsdp2,
}
