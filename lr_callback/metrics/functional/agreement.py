"""How often two models predict the same class."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_agreement(preds: Tensor, target: Tensor, top_k: int = 1) -> Tensor:
    """Return the fraction of samples for which two models predict the same class.

    Args:
        preds: class scores of the model in question, ``(N, C)`` or ``(N, C, ...)`` with ``C`` at least 2, of any
            floating dtype; every place of the further axes is a sample.
        target: class scores of the model that it is compared with, usually the dense one; of the same shape.
        top_k: from 1 to ``C``: the class that ``target`` scores highest must be among so many that ``preds`` scores
            highest. Of equal scores the first class counts as the higher.

    Returns:
        A number from 0 to 1; NaN of no samples. A sample with a score that is NaN agrees with none.

    Raises:
        TypeError: If ``preds`` or ``target`` is no tensor, or ``top_k`` no whole number.
        ValueError: If the shapes, the dtypes or ``top_k`` are others.

    Example::

        >>> import torch
        >>> from lr_callback.metrics.functional import prediction_agreement
        >>> dense = torch.tensor([[5.0, 2.0, 0.0], [1.0, 3.0, 2.0]])
        >>> cut = torch.tensor([[4.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
        >>> prediction_agreement(cut, dense), prediction_agreement(cut, dense, top_k=2)
        (tensor(0.5000), tensor(1.))
    """
    check_top_k(top_k)
    agreed = agreeing(preds, target, top_k)
    return agreed.sum() / agreed.numel()


def agreeing(preds: Tensor, target: Tensor, top_k: int) -> Tensor:
    """Return for each sample ``(N, ...)`` whether the models agree; arguments as of :func:`prediction_agreement`."""
    _check(preds, target, top_k)
    wanted = target.argmax(1, keepdim=True)
    own = preds.gather(1, wanted)
    classes = torch.arange(preds.shape[1], device=preds.device).view(-1, *[1] * (preds.dim() - 2))
    ahead = (preds > own) | ((preds == own) & (classes < wanted))
    known = ~(preds.isnan() | target.isnan()).any(1)
    return (ahead.sum(1) < top_k) & known


def check_top_k(top_k: int) -> None:
    """Refuse what is no number of classes."""
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"PredictionAgreement: `top_k` must be a whole number, got {top_k!r}.")
    if top_k < 1:
        raise ValueError(f"PredictionAgreement: `top_k` must be at least 1, got {top_k}.")


def _check(preds: object, target: object, top_k: int) -> None:
    where = "PredictionAgreement: `preds` and `target`"
    if not (isinstance(preds, Tensor) and isinstance(target, Tensor)):
        found = f"{type(preds).__name__} and {type(target).__name__}"
        raise TypeError(f"{where} must be tensors, got {found}. Give what the models return.")
    if preds.shape != target.shape:
        raise ValueError(
            f"{where} must have the same shape, got {tuple(preds.shape)} and {tuple(target.shape)}. Give the scores of "
            "both models on the same samples."
        )
    if preds.dim() < 2 or preds.shape[1] < 2:
        raise ValueError(
            f"{where} must have the shape (N, C) or (N, C, ...) with at least 2 classes on axis 1, got "
            f"{tuple(preds.shape)}. Where classes are on another axis, move it: `scores.movedim(-1, 1)`."
        )
    if not (preds.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            f"{where} must be class scores of a floating dtype, got {preds.dtype} and {target.dtype}. Give what the "
            "models return, not the classes that they predict."
        )
    if top_k > preds.shape[1]:
        raise ValueError(f"PredictionAgreement: `top_k` must be at most the {preds.shape[1]} classes, got {top_k}.")
