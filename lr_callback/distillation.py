"""Distillation: how far the class scores of a network are from those of the network that it came from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, a mean over all rows and places.

    Args:
        student: scores before the softmax, classes on axis 1; gradients flow to them.
        teacher: likewise, of the same shape.
        temperature: ``T`` above 0; the larger it is, the more the small probabilities count.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2. The
    factor ``T^2`` keeps the gradients as large as those of the loss on labels, whatever ``T``.

    Example::

        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> distillation_loss(scores, scores + 3, temperature=4.0).abs().item() < 1e-6
        True
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    own, wanted = (log_softmax(scores.to(wide) / temperature, 1) for scores in (student, teacher))
    every = kl_div(own, wanted, reduction="none", log_target=True)
    return temperature**2 * every.sum(1).mean()


def check_scores(output: object) -> Tensor:
    """Return what a network gave, if it is class scores: one floating tensor of ``(N, C)`` or ``(N, C, H, W ...)``.

    Raises:
        ValueError: If it is something else.

    Example::

        >>> tuple(check_scores(torch.zeros(2, 10)).shape)
        (2, 10)
    """
    found, more = type(output).__name__, ""
    if isinstance(output, Tensor):
        found = f"a tensor of {tuple(output.shape)}, {output.dtype}"
        if output.is_floating_point() and output.dim() not in (0, 1, 3) and output.shape[1] > 1:
            return output
        if output.dim() == 3:
            more = " Of three axes it cannot be told which is that of the classes."
    raise ValueError(
        "LowRankCompression: `distill` compares class scores before the softmax, so the network must return one "
        f"floating tensor of shape (N, C) or (N, C, H, W) with at least 2 classes, it returned {found}.{more} Let the "
        "`forward` that `training_step` calls return such scores and do the rest in the step, or set distill=None."
    )
