"""Own cost: a unit of the user's own, by a function that says what any module costs.

The function is given modules without values, on the meta device: each layer dense, and each form that it may take, at
each rank. What a model costs must be what its parts cost together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import combinations
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from lr_callback.common.written import is_number, is_plain
from lr_callback.decisions.costs import COSTS, CountedCost, LayerCost, Unit, check_cost, is_unit
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_cost
from lr_callback.layers.weightless import Forms, weightless
from lr_callback.mathematics.folding import Geometry

_LARGEST = 2**53
"""Up to here every whole number is a float, too."""
_FORM = ("kernel_in_encoder", 1)
"""Folding and number of slices of forms that every layer can have."""


class OwnCost:
    """What a user's function says of modules, checked, and each question asked once.

    Args:
        function: from a module to what it costs, in whole units.

    Example::

        >>> def rows(module):
        ...     return sum(parameter.shape[0] for parameter in module.parameters())
        >>> OwnCost(rows).of_layer(nn.Linear(8, 4)).at_ranks("kernel_in_encoder", 1, 3).tolist()[1:]
        [9, 10, 11]
    """

    def __init__(self, function: Callable[[nn.Module], float]) -> None:
        self.function = function
        self.name = _name_of(function)
        self._known: dict[str, dict[tuple[str, int, int], int]] = {}

    def __call__(self, module: nn.Module) -> float:
        """Ask the function, unchecked."""
        return self.function(module)

    def __repr__(self) -> str:
        """Return the name of the function, which is that of the unit."""
        return self.name

    def __getstate__(self) -> dict[str, object]:
        """Leave out what was asked: it is soon asked again."""
        return {**vars(self), "_known": {}}

    def ask(self, module: nn.Module, what: str) -> int:
        """Return what a module costs.

        Args:
            module: of any kind.
            what: the module is, for the text of an error.

        Raises:
            ValueError: If that is not a whole number from 0 to ``2 ** 53``.
        """
        try:
            value = self.function(module)
        except Exception as error:
            if hasattr(error, "add_note"):  # not in Python 3.10
                error.add_note(f"It was raised by cost={self.name} for {what}.")
            raise
        problem = _problem(value)
        if problem is not None:
            raise ValueError(f"cost={self.name}: {what}: must cost {problem}, got {value!r}.")
        return int(value)

    def of_layer(self, layer: nn.Module, name: str = "a layer") -> OwnLayerCost:
        """Return what a layer costs, dense and factorized."""
        dense = weightless(layer)
        settings = _settings(dense)
        known = {} if settings is None else self._known.setdefault(settings, {})
        return OwnLayerCost(layer_cost(dense).geometry, self, dense, name, layer_cost(dense), known)

    def of_model(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> int:
        """Return what a model costs with all layers dense.

        Args:
            model: as it stands, with its values.
            layers: name -> its layers that can be factorized.

        Raises:
            ValueError: If a value is no cost, or what parts cost together is not the sum of what each does.
        """
        costs = {name: self.of_layer(layer, name) for name, layer in layers.items()}
        total, dense = self.ask(model, "the model"), {name: cost.dense for name, cost in costs.items()}
        for name, layer in layers.items():
            if isinstance(layer, FactorizedLayer):
                now = costs[name].at(layer.folding, layer.num_slices, layer.rank)
                total += dense[name] - now
        self._check_sums({name: cost.module for name, cost in costs.items()}, dense, "layers")
        full = {name: cost.geometry.full_rank(*_FORM) for name, cost in costs.items()}
        for ranks, what in ((dict.fromkeys(full, 1), "rank 1"), (_halves(full), "half their rank")):
            made = {name: Forms(cost.module, *_FORM).at(ranks[name]) for name, cost in costs.items()}
            own = {name: cost.at(*_FORM, ranks[name]) for name, cost in costs.items()}
            self._check_sums(made, own, f"layers of {what}")
        if total < sum(dense.values()):
            raise ValueError(
                f"cost={self.name}: a model must cost at least what its layers cost together, {sum(dense.values()):,} "
                f"(all of them dense), got {total:,}. Let the function add up what the parts of a module cost."
            )
        if not total:
            raise ValueError(f"cost={self.name}: the model must cost more than 0, to keep a fraction of it, got 0.")
        return total

    def _check_sums(self, modules: Mapping[str, nn.Module], costs: Mapping[str, int], what: str) -> None:
        """Refuse a function by which several layers together do not cost what each of them does."""
        if self._together(modules) == sum(costs.values()):
            return
        pairs = [(name,) for name in modules] + list(combinations(modules, 2))
        for names in [*pairs, tuple(modules)]:
            found, sums = self._together({name: modules[name] for name in names}), sum(costs[name] for name in names)
            if found != sums:
                raise ValueError(
                    f"cost={self.name}: {what} must cost together what each of them does, {sums:,} for "
                    f"{' and '.join(names)}, got {found:,} for nn.ModuleList of them. Let the function add up what the "
                    "parts of a module cost."
                )

    def _together(self, modules: Mapping[str, nn.Module]) -> int:
        return self.ask(nn.ModuleList(modules.values()), f"nn.ModuleList of {' and '.join(modules)}")


@dataclass(frozen=True)
class OwnLayerCost(LayerCost):
    """What one layer costs by a user's function; a form that costs no less than the dense layer is never chosen.

    Args:
        geometry: sizes of the weight.
        own: the function.
        module: the layer, dense and without values.
        name: of the layer, for the text of an error.
        counted: parameters of the layer, by which equal foldings are told apart.
        known: (folding, number of slices, rank) -> cost, of all layers of these settings; of the dense one at rank 0.
    """

    gates: ClassVar[bool] = True
    geometry: Geometry
    own: OwnCost
    module: nn.Module
    name: str
    counted: CountedCost
    known: dict[tuple[str, int, int], int]

    @property
    def dense(self) -> int:
        """Cost of the dense layer."""
        key = ("dense", 0, 0)
        if key not in self.known:
            self.known[key] = self.own.ask(self.module, f"{self.name}, dense")
        return self.known[key]

    def at(self, folding: str, num_slices: int, rank: int) -> int:
        """Return the cost of one form."""
        return self._asked(folding, num_slices, [rank])[0]

    def at_ranks(self, folding: str, num_slices: int, last: int) -> Tensor:
        """Return the costs of the factorized layer at rank 0, which is not asked for and none, to ``last``, int64."""
        return torch.tensor([0, *self._asked(folding, num_slices, range(1, last + 1))])

    def last_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank, up to the full one, that costs less than the dense layer; 0 if none does."""
        costs = self.at_ranks(folding, num_slices, self.geometry.full_rank(folding, num_slices))
        return max((costs[1:] < self.dense).nonzero().flatten().add(1).tolist(), default=0)

    def distinct_foldings(self, foldings: Iterable[str]) -> tuple[str, ...]:
        """Drop foldings that give the same matrices as another; the one with the fewest parameters stays."""
        return self.counted.distinct_foldings(foldings)

    def _asked(self, folding: str, num_slices: int, ranks: Iterable[int]) -> list[int]:
        forms: Forms | None = None
        found = []
        for rank in ranks:
            key = (folding, num_slices, rank)
            if key not in self.known:
                forms = forms or Forms(self.module, folding, num_slices)
                what = f"{self.name} with {num_slices} slice(s) of rank {rank}, {folding}"
                self.known[key] = self.own.ask(forms.at(rank), what)
            found.append(self.known[key])
        return found


def read_cost(cost: object) -> Unit:
    """Return a cost as it is used: the name of a known unit, or a function, with what is known of it.

    Args:
        cost: a name in :data:`~lr_callback.decisions.costs.COSTS`, a function of a module, or the path to import one
            by.

    Raises:
        ValueError: If it is none of these.

    Example::

        >>> read_cost("bytes"), read_cost("math.sqrt").name
        ('bytes', 'math.sqrt')
    """
    if isinstance(cost, OwnCost) or (isinstance(cost, str) and cost in COSTS):
        return cost
    if isinstance(cost, str) and "." in cost:
        cost = _imported(cost)
    if not callable(cost) or isinstance(cost, type):
        check_cost(cost)
    assert callable(cost)
    return OwnCost(cost)


def _imported(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`cost` must be one of {list(COSTS)}, or a function of a module: {path!r} cannot be imported "
            f"({type(error).__name__}: {error})."
        ) from error


def _name_of(function: object) -> str:
    """Return the path of a function, or of the class of what is called like one."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    path = f"{getattr(named, '__module__', None) or 'own'}.{getattr(named, '__qualname__', 'cost')}"
    readable = re.sub(r"[^\w.<>]", "_", path)
    return readable if is_unit(readable) else "own.cost"


def _problem(value: object) -> str | None:
    """Return what a cost must be and this is not; None if it is one."""
    if not is_number(value) or not isfinite(value):
        return "a number: finite, and a plain one (of a tensor `.item()`)"
    if value < 0:
        return "0 or more"
    if value != int(value):
        return "a whole number of units, choose a smaller unit"
    return None if value < _LARGEST else "less than 2 ** 53 units, choose a larger unit"


def _halves(ranks: Mapping[str, int]) -> dict[str, int]:
    return {name: -(-rank // 2) for name, rank in ranks.items()}


def _settings(dense: nn.Module) -> str | None:
    """Return all that tells a layer without values from another, as text; None if it has what is no plain value."""
    own = {name: value for name, value in vars(dense).items() if name not in vars(nn.Module())}
    if not is_plain(own):
        return None
    held = [(name, one) for name, one in dense._parameters.items() if one is not None]
    return repr((type(dense), own, [(name, one.shape, one.dtype, one.requires_grad) for name, one in held]))
