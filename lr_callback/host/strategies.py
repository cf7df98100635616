"""Strategies: how a Trainer spreads a run over processes, and where that is refused, with the ways out.

Classes are told by their names, over their bases: ``lightning`` and ``pytorch_lightning`` have each their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lr_callback.common.processes import Processes, digest
from lr_callback.common.table import listed
from lr_callback.files.hook import has_hook

Value = TypeVar("Value")

_REFUSED: Mapping[str, str] = {
    "FSDPStrategy": "it holds all parameters as shards of flat ones, in which no layer can be replaced",
    "ModelParallelStrategy": "it holds the parameters as shards (DTensor), and a layer that joins later in no group",
    "DeepSpeedStrategy": "its engine holds the parameters in flat buffers, in which no layer can be replaced",
    "XLAStrategy": "XLA reduces the gradients itself, and nobody has tried to replace a layer under it",
}
"""Name of a strategy -> why no layer can be replaced in the middle of its run; also on one device."""

_REFUSED_PRECISION: Mapping[str, str] = {
    "TransformerEnginePrecision": "it converts Linear layers when a run starts, so the factors of a resumed run too, "
    "but not those of the run before",
    "BitsandbytesPrecision": "it quantizes Linear layers when a run starts, and there is no exact weight to factorize",
}
"""Name of a precision plugin -> why."""

_WAYS_OUT = (
    "Train with strategy='ddp'; or leave this callback out, and compress in the module's `configure_model`, before the "
    "parameters are wrapped: `lr_callback.factorize_(net, lr_callback.allocate(net, keep_ratio))`, or, from the "
    "checkpoint of a compressed run, `lr_callback.restore_(net, path)`."
)


def processes_of(trainer: Trainer) -> Processes:
    """Return the processes of a Trainer's run; other jobs of the same process group are not among them."""
    return Processes(trainer.global_rank, trainer.world_size)


def same_on_all(trainer: Trainer, decide: Callable[[], Value]) -> Value:
    """Ask every process whether to compress, and refuse an answer that is not that of all: they would part here.

    Raises:
        ValueError: If they differ.
    """
    answers = processes_of(trainer).gather(decide)
    if any(answer != answers[0] for answer in answers):
        raise ValueError(
            "LowRankCompression: `should_compress` must return the same on every process of the run, got "
            f"{answers} from ranks 0 to {len(answers) - 1} at the start of epoch {trainer.current_epoch}. "
            "Decide on values that are averaged over the ranks, such as those logged with `sync_dist=True`."
        )
    return answers[0]


def check_same_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a module whose weights are not the same on all processes: each would go on with factors of another one.

    Raises:
        RuntimeError: If they differ.
    """
    processes = processes_of(trainer)
    if processes.size == 1:
        return
    left_apart = getattr(trainer.strategy.model, "parameters_to_ignore", ())
    own = {name: one for name, one in pl_module.named_parameters() if name not in left_apart}
    digests = processes.gather(lambda: {name: digest(one) for name, one in own.items()})
    differ = [name for name in digests[0] if any(one.get(name) != digests[0][name] for one in digests)]
    if differ:
        raise RuntimeError(
            f"LowRankCompression: the weights must be the same on all {processes.size} processes before a compression, "
            f"those of {listed(differ)} differ. DDP does not average "
            "parameters that were unfrozen after it had wrapped the module (BackboneFinetuning: put it before this "
            "callback, or unfreeze in the epoch of a compression or before the training). Nothing was changed."
        )


def check_strategy(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a run whose module cannot change in its middle, or whose result would be lost.

    Args:
        trainer: in its ``setup``.
        pl_module: as the run was given it; no hook of this package has been added in this process.

    Raises:
        MisconfigurationException: If its strategy, precision or launcher is refused; the text says which and why.
    """
    strategy, bases = trainer.strategy, _names(trainer.strategy)
    for name in _REFUSED:
        if name in bases:
            raise MisconfigurationException(
                f"LowRankCompression: {_called(strategy, name)}: {_REFUSED[name]}. {_WAYS_OUT}"
            )
    if trainer.world_size > 1 and "DDPStrategy" not in bases:
        raise MisconfigurationException(
            f"LowRankCompression: {type(strategy).__name__} on {trainer.world_size} processes: on several processes "
            f"the strategy must be DDPStrategy or a subclass, it is not known how this one wraps a module. {_WAYS_OUT}"
        )
    _check_averaging(strategy)
    _check_precision(trainer)
    _check_launcher(trainer, pl_module)


def _names(thing: object) -> set[str]:
    """Return the names of a thing's class and of all of its bases."""
    return {base.__name__ for base in type(thing).__mro__}


def _called(strategy: object, name: str) -> str:
    own = type(strategy).__name__
    return own if own == name else f"{own} (a {name})"


def _check_averaging(strategy: object) -> None:
    state = getattr(strategy, "_ddp_comm_state", None)
    if "PostLocalSGDState" in _names(state):
        raise MisconfigurationException(
            "LowRankCompression: DDPStrategy(ddp_comm_state=PostLocalSGDState(...)): gradients must be averaged over "
            "all processes at every step, this averages the weights now and then, and between two times each process "
            "would have factors of its own. Leave `ddp_comm_state` and `ddp_comm_hook` out."
        )


def _check_precision(trainer: Trainer) -> None:
    bases = _names(trainer.precision_plugin)
    for name, reason in _REFUSED_PRECISION.items():
        if name in bases:
            raise MisconfigurationException(
                f"LowRankCompression: {name}: {reason}. Train with precision='bf16-mixed' or another of Lightning's "
                "own; or leave this callback out, and convert the layers of a compressed model after the training."
            )


def _check_launcher(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a run in child processes if the parent's module could not take their weights at the end.

    Lightning loads them there with ``strict=False``: a module without the hook would keep its first weights where the
    names differ, and nobody would be told.
    """
    if "_MultiProcessingLauncher" in _names(trainer.strategy.launcher) and not has_hook(pl_module):
        raise MisconfigurationException(
            "LowRankCompression: ddp_spawn, ddp_fork, ddp_notebook: these train in child processes, and the module "
            "of the process that called `fit` must be ready to take the compressed weights at the end. Call "
            "`lr_callback.prepare(module)` before `trainer.fit(module)`, or train with strategy='ddp'."
        )
