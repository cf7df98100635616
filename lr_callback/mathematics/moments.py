"""Moments: sums of rows that stream by and of their products, as a torchmetrics ``Metric``, for several processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class SecondMoments(Metric):
    """Second moments ``E[x x^T]`` of the rows of matrices, in groups, as they come, and their means.

    Products of one update are in float32 (float64 for float64 rows), about the mean of its rows; sums over updates are
    in float64. So what varies is seen to single precision, however far from zero it is; in float32, what varies by less
    than 1e-19 has squares of zero.

    Args:
        size: ``s``, entries of a row, at least 1.
        groups: ``g``, at least 1.
        diagonal: keep the mean squares ``E[x^2]`` alone.
        kwargs: of :class:`torchmetrics.Metric`; with ``sync_on_compute``, as by default, `compute` adds up the
            processes of a distributed run, which all must call it then.

    Raises:
        ValueError: If a number is out of range.

    Memory: ``8 * g * s^2`` bytes, or ``8 * g * s``.

    Example::

        >>> from lr_callback.metrics import SecondMoments
        >>> metric = SecondMoments(size=2)
        >>> metric.update(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
        >>> metric.compute()
        tensor([[[5., 1.],
                 [1., 2.]]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    sums: Tensor
    count: Tensor

    def __init__(self, size: int, groups: int = 1, diagonal: bool = False, **kwargs: object) -> None:
        for name, value in {"size": size, "groups": groups}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"SecondMoments: `{name}` must be a whole number of at least 1, got {value!r}.")
        super().__init__(**kwargs)
        shape = (groups, size) if diagonal else (groups, size, size)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros((groups, size), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def means(self) -> Tensor:
        """Means ``E[x]`` of the rows, ``(g, s)``, float64; zero before the first row."""
        return self.sums / self.count.clamp(min=1)

    @property
    def products(self) -> Tensor:
        """Second moments as of :meth:`compute`; zero before the first row."""
        return self.total / self.count.clamp(min=1)

    @property
    def diagonal(self) -> bool:
        """Whether only mean squares are kept."""
        return self.total.dim() == 2

    def update(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: ``(g, n, s)``, any floating dtype.

        Raises:
            TypeError: If it is no tensor, or one of no floating dtype. Nothing was added.
            ValueError: If a value is not finite, or the shape is another. Nothing was added.
        """
        check_rows(rows)
        groups, size = self.total.shape[:2]
        if rows.dim() != 3 or rows.shape[0] != groups or rows.shape[2] != size:
            raise ValueError(
                f"SecondMoments: `rows` must have the shape ({groups}, n, {size}), got {tuple(rows.shape)}."
            )
        rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
        sums = rows.sum(1, dtype=torch.float64)
        middle = (sums / max(1, rows.shape[1])).to(rows.dtype)
        centered = rows - middle.unsqueeze(1)
        with torch.autocast(rows.device.type, enabled=False):  # a layer's inputs are met where it may be on
            products = centered.square().sum(1) if self.diagonal else centered.mT @ centered
        squares = products if self.diagonal else products.diagonal(dim1=1, dim2=2)
        if not bool(torch.isfinite(squares).all()):
            raise ValueError("SecondMoments: `rows` must be finite, found NaN, infinity or values too large to square.")
        self._add(products, sums, middle.double(), rows.shape[1])

    def _add(self, products: Tensor, sums: Tensor, middle: Tensor, count: int) -> None:
        """Add products about a middle ``m``, with ``sum x x^T = sum (x - m)(x - m)^T + s m^T + m (s - n m)^T``."""
        rest = sums - count * middle
        if self.total.is_inference() and not torch.is_inference_mode_enabled():  # reset or begun in inference mode
            self.total, self.sums, self.count = self.total.clone(), self.sums.clone(), self.count.clone()
        self.total += products
        for left, right in ((sums, middle), (middle, rest)):
            if self.diagonal:
                self.total += left * right
            else:
                self.total.baddbmm_(left.unsqueeze(2), right.unsqueeze(1))
        self.sums += sums
        self.count += count

    def compute(self) -> Tensor:
        """Return the moments ``(g, s, s)``, or ``(g, s)``, float64; NaN before the first row."""
        return self.total / self.count

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Plot the mean square of each entry of a row with matplotlib, groups as lines.

        Args:
            val: of ``compute`` or ``forward``; None: what ``compute`` gives now.
            ax: where to draw; None: in a figure of its own.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        moments = (self.compute() if val is None else val).reshape(self.total.shape)
        squares = moments if self.diagonal else moments.diagonal(dim1=1, dim2=2)
        plotted = self._plot(list(squares.T if len(squares) > 1 else squares[0]), ax)
        figure, axes = cast("tuple[Figure | None, Axes]", plotted)
        axes.set_xlabel("entry of a row")
        axes.set_ylabel("mean square")
        axes.set_xticks(range(0, squares.shape[1], -(-squares.shape[1] // 10)))
        return figure, axes


def check_rows(rows: object) -> None:
    """Refuse what is no tensor of a floating dtype.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(rows, Tensor) or not rows.dtype.is_floating_point:
        found = f"one of {rows.dtype}" if isinstance(rows, Tensor) else f"an object of the type {type(rows).__name__}"
        raise TypeError(
            f"SecondMoments: `rows` must be a tensor of a floating dtype, got {found}; convert it, as by "
            "`torch.as_tensor(rows, dtype=torch.float32)`."
        )


def summed(parts: Sequence[SecondMoments]) -> SecondMoments:
    """Add up moments of the same entries, of other rows each; one alone is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    whole = copy.copy(parts[0])
    whole.total = torch.stack([one.total for one in parts]).sum(0)
    whole.sums = torch.stack([one.sums for one in parts]).sum(0)
    whole.count = torch.stack([one.count for one in parts]).sum(0)
    return whole
