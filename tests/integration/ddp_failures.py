"""Cuts that fail on one rank: what the others see of it, and whether the run could go on."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ddp_parts import RANK, OnEpoch, digest, events, failure, of_state, patched, run
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.edits import build
from lr_callback.host import cut


class FailsOn(lrc.ALDS):
    """ALDS that fails on one rank."""

    def candidates(self, *arguments: Any) -> Any:
        if RANK == 1:
            raise ArithmeticError("no convergence")
        return super().candidates(*arguments)


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


def goes_on_with_a_full_disk() -> dict[str, Any]:
    class Full(DDPStrategy):
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            if RANK == 1:
                raise OSError(28, "No space left on device")
            super().save_checkpoint(*arguments, **options)

    compression = events(snapshots=True)
    with TemporaryDirectory() as root, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(compression=compression, strategy=Full(), default_root_dir=root)
        left = [path.name for path in Path(root).rglob("*.ckpt*")]
    said = [str(one.message) for one in caught if "could not be written" in str(one.message)]
    return {**found, "said": said, "left": left, "snapshots": compression.snapshot_files}


def fails_apart() -> dict[str, Any]:
    def move(host: Trainer, module: LightningModule) -> None:
        with torch.no_grad():
            module.network[4].weight[0, 0] += RANK

    return failure(lambda: run(OnEpoch(1, move)))


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


def fails_in_buffers() -> dict[str, Any]:
    class Full(Tensor):
        def clone(self, **options: Any) -> Tensor:
            raise MemoryError("no room for the buffers")

    @contextmanager
    def patch(host: Trainer) -> Iterator[None]:
        counter = torch.zeros(1)
        host.lightning_module.register_buffer("counter", counter.as_subclass(Full) if RANK == 1 else counter)
        yield
        del host.lightning_module.counter

    return goes_on_after(patch)


def interrupted() -> dict[str, Any]:
    """Interrupt one rank when it is about to meet the others, which will not hear of it if it goes away now."""
    exchange, times = torch.distributed.all_gather_object, []

    def disturbed(*arguments: Any) -> None:
        times.append(1)
        if RANK == 1 and len(times) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        exchange(*arguments)

    return goes_on_after(lambda host: patched(torch.distributed, "all_gather_object", disturbed))


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fails in the analysis": fails_in_analysis,
    "fails with NaN": fails_with_nan,
    "fails in the factors": fails_in_factors,
    "full disk": goes_on_with_a_full_disk,
    "fails apart": fails_apart,
    "fails to agree": fails_to_agree,
    "fails in the swap": fails_in_swap,
    "fails in the wrapping": fails_in_wrapping,
    "fails in the buffers": fails_in_buffers,
    "interrupted": interrupted,
}
