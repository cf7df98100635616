"""Journal: what a compression logs, at its step to the loggers and for its epoch to other callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning.pytorch import LightningModule, Trainer

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import LATENCY
from lr_callback.decisions.curves import Curves
from lr_callback.model.held import dense_parameters, held_parameters
from lr_callback.model.observe import Observation
from lr_callback.observation.gallery import Gallery
from lr_callback.observation.metrics import compression_metrics
from lr_callback.observation.report import show


def tell(
    trainer: Trainer,
    pl_module: LightningModule,
    allocation: Allocation,
    observation: Observation | None,
    seconds: float,
    show_table: bool,
    curves: Curves,
    gallery: Gallery,
    known: Mapping[str, float],
    note: Callable[[float | None], str],
) -> None:
    """Log the metrics of a compression, give loggers its figures, and print its table.

    Args:
        trainer: whose loggers are told.
        pl_module: after the compression.
        allocation: that was carried out.
        observation: of a batch; without one multiply-adds are not logged.
        seconds: that it took.
        show_table: whether to print.
        curves: of the allocation.
        gallery: of the run.
        known: accuracies and times of the network, by the names that they are logged by, those that are known.
        note: makes what is printed below the table, of the milliseconds that were predicted; may be empty.
    """
    parameters = (held_parameters(pl_module), dense_parameters(pl_module))
    predicted = _predicted(allocation)
    metrics = compression_metrics(
        allocation,
        parameters,
        _multiply_adds(pl_module, observation),
        seconds,
        {**known, **({} if predicted is None else {"milliseconds": predicted})},
    )
    metrics.to(pl_module.device)
    for name, metric in metrics.items():
        pl_module.log(name, metric, on_step=False, on_epoch=True, logger=False, metric_attribute=name)
    values = {name: float(value) for name, value in metrics.compute().items()}
    log_now(trainer, values)
    if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):  # whose loggers keep nothing
        logged = [name.removeprefix("compression/") for name in values]
        gallery.show(trainer.loggers, allocation, curves, logged_step(trainer), logged)
    if show_table:
        title = f"Low-rank compression at the start of epoch {trainer.current_epoch}"
        show(trainer, "\n".join(filter(None, (title, str(allocation), note(predicted)))))


def log_multiply_adds(trainer: Trainer, pl_module: LightningModule, observation: Observation | None) -> None:
    """Log what could not be counted yet when the first epoch began with a compression."""
    counted = _multiply_adds(pl_module, observation)
    if counted is not None:
        name, value = "compression/kept_multiply_adds", counted[0] / counted[1]
        pl_module.log(name, value, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=True)
        log_now(trainer, {name: value})


def _predicted(allocation: Allocation) -> float | None:
    """Return the milliseconds of one run of the model, where time is among the costs."""
    own = {allocation.unit: allocation.cost} | {unit: one.cost for unit, one in allocation.others.items()}
    return own[LATENCY] / 1e6 if LATENCY in own else None


def _multiply_adds(pl_module: LightningModule, observation: Observation | None) -> tuple[int, int] | None:
    """Return the module's multiply-adds now and with all layers dense; None: not known, or none, as of embeddings."""
    if observation is None or observation.dense_multiply_adds == 0:
        return None
    return observation.multiply_adds(pl_module), observation.dense_multiply_adds


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Tell the loggers, at this step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logged_step(trainer))


def logged_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs: ``global_step`` is another where one batch takes several, or none."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
