"""Distilling: the network before the first cut, what its scores add to the loss, and how a resumed run has it again.

The step of a module calls its network once. That call is heard, and made again of a frozen copy: nothing is asked of
the module, and neither its parameters, buffers and random numbers nor the names in its files know of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from lr_callback.common.table import listed
from lr_callback.common.untouched import as_written
from lr_callback.common.written import is_number
from lr_callback.files.checkpoint import adapt_structure
from lr_callback.host.copies import copied_module
from lr_callback.host.strategies import processes_of
from lr_callback.mathematics.distillation import class_scores, distillation_loss
from lr_callback.model.heard import Heard, Invocation

_LOGGED = "compression/distillation_loss"
_STEP = "training_step"


class Distilling:
    """What a run learns of its network before the first cut.

    Args:
        weight: of the distillation loss, the own loss having the rest; None: nothing is distilled.
        temperature: of both softmaxes.

    Attributes:
        written: the teacher's weights while there is no teacher: between a file, or a fit, and the next training.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, weight: float | None, temperature: float) -> None:
        if weight is not None and not (is_number(weight) and 0 < weight <= 1):
            raise ValueError(f"`distill` must be a weight in (0, 1] or None, got {weight!r}.")
        if not (is_number(temperature) and 0 < temperature < float("inf")):
            raise ValueError(f"`distill_temperature` must be a number above 0, got {temperature!r}.")
        self._weight, self._temperature = weight, temperature
        self.written: Mapping[str, Tensor] | None = None
        self._teacher: nn.Module | None = None
        self._name: str | None = None
        self._metric = MeanMetric()
        self._heard = Heard()
        self._watched: nn.Module | None = None
        self._stop: Callable[[], None] | None = None

    @property
    def weights(self) -> Mapping[str, Tensor] | None:
        """The teacher's weights, by name; None before the first cut."""
        return self.written if self._teacher is None else _tensors(self._teacher)

    def check(self, pl_module: LightningModule) -> None:
        """Refuse a module whose loss is not handed over.

        Raises:
            MisconfigurationException: If it optimizes by itself.
        """
        if self._weight is not None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "LowRankCompression: `distill` adds to the loss that `training_step` returns, and this module steps "
                "its optimizers itself (automatic_optimization=False). Let Lightning optimize, or set distill=None and "
                "add `lr_callback.distillation_loss` in the step."
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, cut: bool) -> None:
        """Make the teacher again that a run had before, or refuse one that had none.

        Args:
            trainer: in its ``on_train_start``.
            pl_module: on its device.
            cut: whether the run was compressed before.

        Raises:
            MisconfigurationException: If there is no copy of the network before the cut, or it is of another one.
        """
        written, self.written = self.written, None
        if self._weight is None or not cut:
            return
        if written is None:
            raise MisconfigurationException(
                "LowRankCompression: `distill` compares with the network before the first compression, and the run "
                f"that is gone on with{f' from {trainer.ckpt_path}' if trainer.ckpt_path else ''} was compressed "
                "without keeping it. Go on with distill=None, or begin again from a file of before the compression."
            )
        self._teacher = _restored(frozen_copy(trainer, pl_module), written)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy of a network that is about to be cut for the first time; the same on every process.

        Raises:
            MisconfigurationException: If it cannot be copied.
        """
        if self._weight is None or self._teacher is not None:
            return
        processes = processes_of(trainer)
        made = processes.agree(lambda: frozen_copy(trainer, pl_module), long=True)
        # Running statistics differ between processes, and the file of a run has those of the first.
        processes.share(list(_tensors(made).values()), pl_module.device, "the entries of the state dict")
        self._teacher = made

    def watch(self, pl_module: LightningModule) -> None:
        """Take part in the step of a batch that begins: to see what the network gives, or to add to the loss."""
        if self._weight is None or self._stop or (self._name is not None and self._teacher is None):
            return
        own, step = dict(vars(pl_module)), pl_module.training_step

        @wraps(step)
        def distilled(*arguments: object, **named: object) -> object:
            return self._step(pl_module, lambda: step(*arguments, **named))

        def stop() -> None:
            vars(pl_module).pop(_STEP)
            vars(pl_module).update({name: own[name] for name in [_STEP] if name in own})

        vars(pl_module)[_STEP], self._stop = distilled, stop

    def stop(self) -> None:
        """Take part no longer."""
        if self._stop:
            self._stop()
        if self._watched is None:
            self._heard.detach()
        self._heard.forget()
        self._stop = None

    def end(self) -> None:
        """Give the device's memory back; the weights stay, in main memory, for files that are written later."""
        self.stop()
        self._heard.detach()
        self._watched = self._name = None
        weights = self.weights
        self.written = None if weights is None else {name: value.cpu() for name, value in weights.items()}
        self._teacher = None

    def log(self, pl_module: LightningModule) -> None:
        """Log the distillation loss of the batches so far, after the last of them, as a mean over an epoch's."""
        self.stop()
        if self._metric.update_called:
            pl_module.log(_LOGGED, self._metric, on_step=False, on_epoch=True, metric_attribute=_LOGGED)

    def _step(self, pl_module: LightningModule, step: Callable[[], object]) -> object:
        """Run a step, see how it calls its network, and add to the loss that it returns."""
        if not torch.is_grad_enabled():  # nobody trains
            return step()
        with self._listening(pl_module):
            result = step()
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            return result
        call, scores = _the_call(pl_module, self._heard)
        self._name = next(name for name, one in pl_module.named_modules() if one is call.module)
        if self._teacher is None or self._weight is None:
            return result
        penalty = self._penalty(self._teacher.get_submodule(self._name), call, scores)
        self._heard.forget()
        loss = (1 - self._weight) * loss + self._weight * penalty
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    @contextmanager
    def _listening(self, pl_module: LightningModule) -> Iterator[None]:
        """Hear the calls of the module that gives the scores; of all modules, run as they are written, to find it."""
        found = None if self._name is None else pl_module.get_submodule(self._name)
        if found is None or found is not self._watched:
            self._heard.attach([found] if found else pl_module.modules())
        self._watched = found
        with nullcontext() if found else as_written(), self._heard.listening():
            yield

    def _penalty(self, teacher: nn.Module, call: Invocation, scores: Tensor) -> Tensor:
        """Return the distillation loss of a batch, and note it for the log."""
        device = scores.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            wanted = class_scores(call.repeat(getattr(teacher, "_orig_mod", teacher)))
        if wanted.requires_grad or wanted.shape != scores.shape:
            raise MisconfigurationException(
                "LowRankCompression: `distill` runs a frozen copy of the network, and what the copy gives does not "
                f"come from its own weights alone, or not in the shape of the network's ({tuple(scores.shape)}). It "
                "may hold functions or modules of the network in a list, a closure or a patched `forward`: hold them "
                "as attributes and methods, or set distill=None."
            )
        penalty = distillation_loss(scores, wanted, self._temperature)
        self._metric.to(scores.device).update(penalty.detach(), weight=len(scores))
        return penalty


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a module's state dict."""
    # Not by its own method, which a LightningModule may override to leave out what it can get elsewhere.
    state = nn.Module.state_dict(module)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def _restored(made: LightningModule, written: Mapping[str, Tensor]) -> LightningModule:
    """Give a copy the structure and the values that were written, bit for bit."""
    adapt_structure(made, written)
    own = _tensors(made)
    differ = sorted(name for name in own.keys() | written.keys() if _shape(own, name) != _shape(written, name))
    if differ:
        raise MisconfigurationException(
            "LowRankCompression: the network before the first compression, which the checkpoint keeps for `distill`, "
            f"must have the entries and shapes of this one, they differ at {listed(differ)}. Resume with the module of "
            "the run before, or with distill=None."
        )
    for name, value in own.items():
        value.copy_(written[name])
    return made.eval().requires_grad_(False)


def _shape(state: Mapping[str, Tensor], name: str) -> object:
    return (state[name].shape, state[name].dtype) if name in state else None


def _the_call(pl_module: LightningModule, heard: Heard) -> tuple[Invocation, Tensor]:
    """Return the one call of a step, and the scores that it gave.

    Raises:
        MisconfigurationException: If there is not one call, or no gradient through it.
        ValueError: If it gave no scores.
    """
    names = {module: name for name, module in pl_module.named_modules()}
    called = [names[one.module] or type(pl_module).__name__ for one in heard.invocations]
    if len(called) != 1:
        raise MisconfigurationException(
            "LowRankCompression: `distill` must know which outputs are the scores, so `training_step` must call its "
            f"network once, it called {', '.join(called) or 'no module with parameters'}. Call all parts from one "
            "`forward`, as in `scores = self(images)`, or set distill=None."
        )
    scores = class_scores(heard.outputs[0])
    if not scores.requires_grad:
        raise MisconfigurationException(
            f"LowRankCompression: `distill` trains through the scores of {called[0]}, and they have no gradient: "
            "`training_step` calls it without one. Call it with gradients, or set distill=None."
        )
    return heard.invocations[0], scores


def frozen_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Return a copy of a module in eval mode, whose parameters want no gradients, and which logs nothing.

    Raises:
        MisconfigurationException: If it cannot be copied.
    """
    made = copied_module(pl_module, "`distill` keeps a copy", "set distill=None")
    vars(made).update(log=_nothing, log_dict=_nothing)
    made.trainer = trainer
    return made.eval().requires_grad_(False)


def _nothing(*_: object, **__: object) -> None:
    """Log nothing."""
