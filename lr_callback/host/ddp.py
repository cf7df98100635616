"""DDP: a wrapper of ``torch.nn.parallel`` knows the parameters that it was made with; a surgery needs a new one.

Without that the gradients of new parameters are not averaged, and with ``find_unused_parameters`` nothing says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from lr_callback.common.processes import Processes

_STATIC_GRAPH_STARTED = "_pl_static_graph_delay_done"
_BY_BUCKET = ("error_dict", "p_memory_dict", "q_memory_dict")
"""What PowerSGD remembers of each bucket of gradients, by its index; the new wrapper has other buckets."""

_Kept = Sequence[tuple[Tensor, Tensor]]
"""Buffers, each with its value."""


@runtime_checkable
class _Wraps(Protocol):
    """What is used of a DDPStrategy, of either package of Lightning."""

    model: nn.Module | None

    def configure_ddp(self) -> None:
        """Wrap the model."""


def rebuild_wrapper(strategy: object, processes: Processes, undo: ExitStack) -> None:
    """Wrap a strategy's module anew, if it is wrapped in DDP; the last step of a cut.

    The wrapper before stays whole until the new one stands on every rank, so that what undoes the surgery gives back a
    run that could go on. Until then the buckets of both are in memory.

    Args:
        strategy: a DDPStrategy, of either package; of another the model is not wrapped.
        processes: of the run.
        undo: given what puts the wrapper before back.
    """
    old = getattr(strategy, "model", None)
    if not isinstance(old, DistributedDataParallel):
        return
    assert isinstance(strategy, _Wraps)
    _synchronize(old.module)
    # All that a rank can fail in by itself comes first: the constructor is where ranks meet without telling an error.
    kept = processes.agree(lambda: _prepare(strategy, old, undo))
    processes.agree(lambda: _wrap(strategy, old, kept))
    _synchronize(old.module)
    _let_go(old)  # at once, whoever else still holds the wrapper


def _let_go(wrapper: DistributedDataParallel) -> None:
    """Let the gradients of a wrapper's parameters no longer start its reduction."""
    remove: Callable[[], None] | None = getattr(wrapper, "_remove_autograd_hooks", None)
    if remove is not None:
        remove()


def _synchronize(module: nn.Module) -> None:
    """Wait for the device: Lightning builds the wrapper on a stream of its own, which does not wait for the factors."""
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)


def _prepare(strategy: _Wraps, old: DistributedDataParallel, undo: ExitStack) -> _Kept:
    """Detach the module, and what else belongs to the wrapper, from it; return the values of its buffers."""
    kept = [(buffer, buffer.detach().clone()) for buffer in old.module.buffers()]
    undo.callback(_put_back, strategy, old, getattr(strategy, _STATIC_GRAPH_STARTED, None))
    for state in _comm_states(strategy, old):
        _restart(state, undo)
    if hasattr(strategy, _STATIC_GRAPH_STARTED):
        # Left at True, Lightning would not start the new wrapper's reduction under manual optimization.
        setattr(strategy, _STATIC_GRAPH_STARTED, False)
    strategy.model = old.module
    return kept


def _put_back(strategy: _Wraps, old: DistributedDataParallel, static_graph_started: bool | None) -> None:
    new, strategy.model = strategy.model, old
    if isinstance(new, DistributedDataParallel):
        _let_go(new)
    if static_graph_started is not None:
        setattr(strategy, _STATIC_GRAPH_STARTED, static_graph_started)


def _comm_states(strategy: _Wraps, old: DistributedDataParallel) -> list[object]:
    """Return the states of the wrapper's communication hooks, each once."""
    states = [getattr(strategy, "_ddp_comm_state", None), *(state for _, state in getattr(old, "_comm_hooks", ()))]
    found = {id(state): state for state in states if state is not None}
    return [state for state in found.values() if not isinstance(state, torch.distributed.ProcessGroup)]


def _restart(state: object, undo: ExitStack) -> None:
    """Let PowerSGD begin anew, with plain averages until the buckets are settled."""
    if not isinstance(state, PowerSGDState):
        rank_zero_warn(
            f"LowRankCompression: the state of the DDP communication hook, {type(state).__name__}, is taken over as it "
            "is; if it remembers gradients or buckets, they are of the model before the compression. Let a callback "
            "that comes after this one clear them at the start of the epoch; of PowerSGD's state it is done here."
        )
        return
    for name in _BY_BUCKET:
        undo.callback(getattr(state, name).update, dict(getattr(state, name)))
        undo.callback(getattr(state, name).clear)
        getattr(state, name).clear()
    undo.callback(setattr, state, "iter", state.iter)
    state.iter = 0


def _wrap(strategy: _Wraps, old: DistributedDataParallel, kept: _Kept) -> None:
    """Wrap the module as the strategy does, with the hooks that somebody else gave the wrapper before."""
    strategy.configure_ddp()
    new = strategy.model
    assert isinstance(new, DistributedDataParallel)
    _fill(kept)
    if not getattr(new, "_comm_hooks", ()):
        for hook, state in getattr(old, "_comm_hooks", ()):
            new.register_comm_hook(state, hook)
    if old.static_graph and not new.static_graph:
        start: Callable[[], None] = new._set_static_graph
        start()


@torch.no_grad()
def _fill(kept: _Kept) -> None:
    """Undo the constructor's broadcast of buffers: each rank may have its own, with ``forward_sync_buffers=False``."""
    for buffer, value in kept:
        buffer.copy_(value)
