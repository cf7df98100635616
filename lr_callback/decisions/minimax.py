"""Minimax: share one budget so that the largest error is smallest, then the next largest, and so on.

Every layer starts at its cheapest choice. The steps from each choice to the layer's next better one, of all layers,
are taken in the order of the error that they leave behind, largest first. A step that no longer fits the budget
stops its layer for good. The first layer to stop has the largest error, and it cannot be had smaller: all steps taken
so far were needed by *any* allocation with a smaller largest error, and so was the one that does not fit. That is the
exact optimum with its certificate; going on gives the next largest error, and so on (leximin).
"""

from __future__ import annotations

from collections.abc import Mapping

from lr_callback.decisions.candidates import Frontier


def minimax(frontiers: Mapping[str, Frontier], budget: int) -> dict[str, int]:
    """Allocate a budget over layers.

    Args:
        frontiers: layer name -> its choices, cost ascending and error descending.
        budget: what all layers together may cost; at least the sum of their cheapest choices.

    Returns:
        Layer name -> index of its choice. The result depends on names and values, not on the order of the layers.
        Between layers with the very same error the cheaper step goes first.

    Raises:
        ValueError: If the cheapest choices do not fit the budget.

    Source: arXiv 2107.11442, equation (4) states the problem; it is solved there by a local search from random seeds.

    Example::

        >>> one = Frontier([1, 2, 4], [0.9, 0.5, 0.0], [None] * 3)
        >>> two = Frontier([1, 3], [0.7, 0.0], [None] * 2)
        >>> minimax({"one": one, "two": two}, budget=5)
        {'one': 1, 'two': 1}
    """
    left = budget - sum(edge.costs[0] for edge in frontiers.values())
    if left < 0:
        raise ValueError(f"`budget` must be at least {budget - left}, the cheapest choices together, got {budget}.")
    chosen = dict.fromkeys(frontiers, 0)
    stopped: set[str] = set()
    for _, price, name in sorted(_steps(frontiers)):
        if name in stopped:
            continue
        if price > left:
            stopped.add(name)
            continue
        left -= price
        chosen[name] += 1
    return chosen


def _steps(frontiers: Mapping[str, Frontier]) -> list[tuple[float, int, str]]:
    """List each layer's steps to its next choice: minus the error left behind, its price, the layer."""
    return [
        (-edge.errors[index], edge.costs[index + 1] - edge.costs[index], name)
        for name, edge in frontiers.items()
        for index in range(len(edge.costs) - 1)
    ]
