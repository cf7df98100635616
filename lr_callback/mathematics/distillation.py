"""Distillation: how far the class scores of a network are from those of the network that it came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

_NAMES = ("logits", "out")
"""What class scores are called in a mapping."""

_REFUSED = (
    "LowRankCompression: `distill` compares class scores before the softmax, so the network must return one floating "
    "tensor of shape (N, C) or (N, C, H, W) with at least 2 classes, or a mapping with one as 'logits' or 'out', it "
    "returned {}.{} Let the `forward` that `training_step` calls return such scores and do the rest in the step, or "
    "set distill=None."
)


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


def class_scores(output: object) -> Tensor:
    """Return the class scores in what a network gave, with the classes on axis 1.

    Args:
        output: a floating tensor of ``(N, C)`` or ``(N, C, H, W ...)``; or a mapping that has such a tensor as
            ``logits``, as the outputs of transformers, or as ``out``, as torchvision's segmentation. ``logits`` of
            three axes are ``(N, positions, C)``, as in transformers.

    Raises:
        ValueError: If it is something else.

    Example::

        >>> tuple(class_scores(torch.zeros(2, 10)).shape), tuple(class_scores({"logits": torch.zeros(2, 7, 10)}).shape)
        ((2, 10), (2, 10, 7))
    """
    name = next((one for one in _NAMES if isinstance(output, Mapping) and one in output), None)
    scores = output[name] if isinstance(output, Mapping) and name else output
    if not isinstance(scores, Tensor):
        raise ValueError(_REFUSED.format(type(output).__name__, ""))
    found = f"a tensor of {tuple(scores.shape)}, {scores.dtype}{f' as {name!r}' if name else ''}"
    if scores.dim() == 3 and name != "logits":
        raise ValueError(_REFUSED.format(found, " Of three axes it cannot be told which is that of the classes."))
    ordered = scores.movedim(2, 1) if scores.dim() == 3 else scores
    if not ordered.is_floating_point() or ordered.dim() < 2 or ordered.shape[1] < 2:
        raise ValueError(_REFUSED.format(found, ""))
    return ordered
