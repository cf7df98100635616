"""Choices: what all layers can become, in one table, with what each choice costs in every unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lr_callback.decisions.candidates import Candidate, LayerCandidates


@dataclass(frozen=True)
class Choices:
    """The choices of all layers, one layer after the other, by name; of each the cheaper ones first.

    Args:
        layers: name -> candidates, by name.
        owners: ``(n,)`` int64: of each choice, the place of its layer; ascending.
        errors: ``(n,)`` float64, all finite; of the dense layer 0.
        costs: ``(units, n)`` int64.
        forms: ``(n, 2)`` int64: the place of its candidate and the rank; of the dense layer -1 and 0.
    """

    layers: Mapping[str, LayerCandidates]
    owners: Tensor
    errors: Tensor
    costs: Tensor
    forms: Tensor

    def of(self, picked: Tensor) -> dict[str, tuple[Candidate, int] | None]:
        """Return the choice of each layer, by the place of one for each."""
        pairs = zip(self.layers.items(), self.forms[picked].tolist(), strict=True)
        return {name: None if index < 0 else (layer.candidates[index], rank) for (name, layer), (index, rank) in pairs}


def list_choices(layers: Mapping[str, LayerCandidates], units: Sequence[str], rank_multiple: int = 1) -> Choices:
    """List the choices of all layers that no other choice of the layer beats in error and all costs at once.

    Args:
        layers: name -> candidates; their ``costs`` are in the first unit, ``others`` in the other ones.
        units: of the costs.
        rank_multiple: ranks must be a multiple of it.

    Example::

        >>> errors = torch.tensor([1.0, 0.5, 0.5, 0.1], dtype=torch.float64)
        >>> layer = LayerCandidates(100, (Candidate("kernel_in_encoder", 1, 4, errors, 20 * torch.arange(4)),))
        >>> list_choices({"one": layer}, ["parameters"]).costs
        tensor([[ 20,  60, 100]])
    """
    ordered = dict(sorted(layers.items()))
    tables = [_table(layer, units, rank_multiple) for layer in ordered.values()]
    sizes = torch.tensor([len(errors) for errors, _, _ in tables])
    errors, costs, forms = zip(*tables, strict=True)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return Choices(ordered, owners, torch.cat(errors), torch.cat(costs, dim=1), torch.cat(forms))


def _table(layer: LayerCandidates, units: Sequence[str], rank_multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors, costs and forms of a layer's choices."""
    dense = torch.tensor([layer.dense_cost, *(layer.others[unit] for unit in units[1:])])
    rows = [(torch.zeros(1, dtype=torch.float64), dense.unsqueeze(1), torch.tensor([[-1, 0]]))]
    rows += _rows(layer, units, rank_multiple)
    errors, costs, forms = (torch.cat(parts, dim=-1) for parts in zip(*((e, c, f.T) for e, c, f in rows), strict=True))
    order = errors.sort(stable=True).indices
    for own in reversed(costs):
        order = order[own[order].sort(stable=True).indices]
    kept = order[unbeaten(torch.cat([errors[None], costs.double()])[:, order])]
    return errors[kept], costs[:, kept], forms.T[kept]


def _rows(layer: LayerCandidates, units: Sequence[str], rank_multiple: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for index, candidate in enumerate(layer.candidates):
        ranks = torch.arange(0, candidate.last + 1, rank_multiple)[1:]
        ranks = ranks[candidate.errors[ranks].isfinite()]
        costs = torch.stack([candidate.costs[ranks], *(candidate.others[unit][ranks] for unit in units[1:])])
        yield candidate.errors[ranks], costs, torch.stack([torch.full_like(ranks, index), ranks], dim=1)


_RIVALS = (2**5, 2**20)
"""First each is compared with so many others, and what is left with so many pairs in all, at most."""


def unbeaten(columns: Tensor) -> Tensor:
    """Return the places of those that none before them equals or beats in every number at once.

    Where there are many each is compared with the first ones only, and some that are beaten stay.

    Args:
        columns: ``(numbers, n)``; the smaller the better.

    Example::

        >>> unbeaten(torch.tensor([[1.0, 2.0, 2.0, 1.0], [3.0, 1.0, 4.0, 3.0]]))
        tensor([0, 1])
    """
    few, pairs = _RIVALS
    kept = torch.nonzero(~_beaten(columns, few)).flatten()
    left = columns[:, kept]
    return kept[~_beaten(left, pairs // max(1, len(kept)))] if len(kept) > 1 else kept


def _beaten(columns: Tensor, rivals: int) -> Tensor:
    """Return of each whether one of the first ones, before it, equals or beats it in every number."""
    first, count = columns[:, : max(1, rivals)], columns.shape[1]
    beats = torch.arange(first.shape[1]) < torch.arange(count)[:, None]
    for own, of_first in zip(columns, first, strict=True):
        beats &= of_first <= own[:, None]
    return beats.any(1)
