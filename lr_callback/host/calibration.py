"""Calibration: some batches of a run's own training, and how its network is called on them, before the network is cut.

The batches come from a copy of the run's training loader, with its sampler, workers and augmentation; the run's own
loader, all random numbers, and the numbers and lists that the module keeps, stay as they are. The module's
``training_step`` is run on each, in eval mode and without gradients, only to see how it calls its network: nothing is
logged, no metric is updated, and the calls are what is repeated afterwards.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from lr_callback.common.untouched import as_written, untouched
from lr_callback.host.copies import copied_loader
from lr_callback.model.probe import Probe
from lr_callback.observation.progress import progress_line

WAYS_OUT = "Set refit=None and recalibrate_batchnorm=False, and choose an error that needs no calibration"
"""What to do where calibration cannot be had."""


def calibration_calls(trainer: Trainer, pl_module: LightningModule, count: int, copies: bool = True) -> list[Probe]:
    """Return the calls of the network on some training batches, to be repeated.

    Which batches these are, and their augmentation, depends on the epoch alone: a resumed run takes the same ones.

    Args:
        trainer: at the start of an epoch.
        pl_module: whose ``training_step`` is run.
        count: number of batches, at most; those of one epoch, if it has fewer.
        copies: see :class:`~lr_callback.model.probe.Probe`.

    Memory: the inputs of the network for all of these batches, on its device.

    Raises:
        MisconfigurationException: If the module optimizes by itself, takes the loader's iterator, or its step never
            calls the network; or if the loader can be gone through only once.
    """
    _check(trainer, pl_module)
    calls: list[Probe] = []
    with isolated_rng(), untouched(pl_module), _silent(pl_module), _kept_notes(pl_module), ExitStack() as stack:
        progress = stack.enter_context(progress_line(trainer, "calibration", "batch"))
        _seed(trainer)
        for batch, index, _ in iter(_loader(trainer, stack)):
            if index >= count:
                break
            if progress is not None:
                progress(index, count, "")
            probe = Probe(pl_module, copies=copies)
            probe.start()
            try:
                with as_written(), trainer.precision_plugin.train_step_context():
                    _step(pl_module, _transferred(trainer, pl_module, batch), index)
            finally:
                probe.stop()
            calls.append(probe)
    if not any(probe.seen for probe in calls):
        raise MisconfigurationException(
            f"LowRankCompression: the calibration must see the network called in `training_step`, and of {len(calls)} "
            f"batch(es) none called a module with parameters. {WAYS_OUT}."
        )
    return calls


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Give all random states back, after an error or an interrupt, too: Lightning's own context does not."""
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "LowRankCompression: calibration runs `training_step` without training, and this module's steps its "
            f"optimizers itself (automatic_optimization=False). {WAYS_OUT}."
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "LowRankCompression: calibration needs a `training_step` that takes a batch, and this one takes the "
            f"loader's iterator (dataloader_iter). {WAYS_OUT}."
        )


def _seed(trainer: Trainer) -> None:
    seed = 1000 * trainer.current_epoch + trainer.global_rank
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def _loader(trainer: Trainer, stack: ExitStack) -> CombinedLoader:
    """Return a copy of the training loader."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    return copied_loader(loader, stack, "calibration goes through the training loader", f"{WAYS_OUT}.")


def _transferred(trainer: Trainer, pl_module: LightningModule, batch: object) -> object:
    """Bring a batch to the module's device, through the same hooks as a training batch."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _step(pl_module: LightningModule, batch: object, index: int) -> None:
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    pl_module.training_step(*((batch, index) if takes_index else (batch,)))


@contextmanager
def _silent(pl_module: LightningModule) -> Iterator[None]:
    """Let a module's steps log nothing, and give its metrics back as they were."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    kept = [{name: copy.deepcopy(vars(one).get(name)) for name in (*one._defaults, *_BOOKS)} for one in metrics]
    own = {name: vars(pl_module).get(name, _MISSING) for name in ("log", "log_dict")}
    vars(pl_module).update(dict.fromkeys(own, _nothing))
    try:
        yield
    finally:
        for name, value in own.items():
            if value is _MISSING:
                vars(pl_module).pop(name, None)
            else:
                vars(pl_module)[name] = value
        for metric, states in zip(metrics, kept, strict=True):
            vars(metric).update(states)


@contextmanager
def _kept_notes(pl_module: LightningModule) -> Iterator[None]:
    """Give a module back the numbers and lists that it keeps itself, such as the outputs of an epoch's steps."""
    own = {name: value for name, value in vars(pl_module).items() if name not in _LIGHTNINGS}
    notes = {name: value for name, value in own.items() if type(value) in (*_NUMBERS, *_CONTAINERS)}
    kept = {name: _copied(value) for name, value in notes.items()}
    try:
        yield
    finally:
        for name, contents in kept.items():
            value: Any = notes[name]
            if type(value) in _CONTAINERS:  # others may hold it, too
                value.clear()
                (value.extend if type(value) in _SEQUENCES else value.update)(contents)
            vars(pl_module)[name] = value


def _copied(value: object) -> object:
    """Copy containers, in any nesting, and not what they hold."""
    if type(value) not in _CONTAINERS:
        return value
    made: Any = copy.copy(value)
    if type(value) in _SEQUENCES:
        inner = [_copied(one) for one in made]
        made.clear()
        made.extend(inner)
    elif isinstance(value, dict):
        made.update({key: _copied(one) for key, one in value.items()})
    return made


_LIGHTNINGS = frozenset(vars(LightningModule()))
_NUMBERS = (bool, int, float, str, type(None))
_SEQUENCES = (list, deque)
_CONTAINERS = (*_SEQUENCES, set, dict, OrderedDict, defaultdict, Counter)

_BOOKS = ("_update_count", "_computed", "_forward_cache")
"""What a metric notes beside its states."""

_MISSING = object()


def _nothing(*_: object, **__: object) -> None:
    """Log nothing."""
