"""Second moments of rows."""

from __future__ import annotations

from torch import Tensor

from lr_callback.mathematics.moments import SecondMoments, check_rows


def second_moments(rows: Tensor, diagonal: bool = False) -> Tensor:
    """Return the second moments ``E[x x^T]`` of rows, as of the inputs that a layer's weight is multiplied with.

    Args:
        rows: ``(n, s)``, or ``(g, n, s)`` in groups, of any floating dtype; finite.
        diagonal: the mean squares ``E[x^2]`` alone.

    Returns:
        ``(s, s)``, or ``(s,)`` of mean squares, with the groups in front where there are some; float64. Zeros where
        there is no row.

    Raises:
        TypeError: If it is no tensor, or one of no floating dtype.
        ValueError: If a value is not finite, or the shape is another.

    Example::

        >>> import torch
        >>> from lr_callback.metrics.functional import second_moments
        >>> second_moments(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[5., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    check_rows(rows)
    if rows.dim() not in (2, 3):
        raise ValueError(f"SecondMoments: `rows` must have the shape (n, s) or (g, n, s), got {tuple(rows.shape)}.")
    grouped = rows if rows.dim() == 3 else rows.unsqueeze(0)
    metric = SecondMoments(grouped.shape[2], grouped.shape[0], diagonal, sync_on_compute=False).to(rows.device)
    metric.update(grouped)
    found = metric.total / metric.count.clamp(min=1)
    return found if rows.dim() == 3 else found[0]
