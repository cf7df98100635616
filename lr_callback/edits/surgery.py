"""Surgery: replace layers inside a model, in place, all or nothing.

Everything that can fail (checks, decompositions, memory) is done before the first module is replaced; the swap itself
is a short block that is undone if anything interrupts it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from torch import nn
from torch.optim import Optimizer

from lr_callback.common.parallel import workers
from lr_callback.decisions.allocation import Allocation
from lr_callback.edits.build import build_layers, check_allocation, densified, weights_held
from lr_callback.edits.optimizers import Replacements, replace_parameters
from lr_callback.edits.projection import OptimizerState, check_optimizer_state
from lr_callback.layers import FactorizedLayer
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers

Places = Mapping[nn.Module, Sequence[tuple[nn.Module, str]]]
"""Layer -> the modules that hold it, each with the name there."""
_Place = tuple[nn.Module, str, nn.Module, nn.Module]
"""Where a layer stands: parent, name of the child, old layer, new layer."""


@dataclass(frozen=True)
class SurgeryReport:
    """What a surgery did.

    Args:
        factorized: names of the layers that are now factorized in a new way.
        densified: names of the layers that are dense again.
        unchanged: names of the layers that already were as asked.
        parameters_before: of the whole model.
        parameters_after: of the whole model.
        replacements: old parameter -> the new ones in its place.
        replaced: name of a layer -> the one that stood there before.
    """

    factorized: tuple[str, ...]
    densified: tuple[str, ...]
    unchanged: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    replacements: Replacements = field(repr=False, default_factory=dict)
    replaced: Mapping[str, nn.Module] = field(repr=False, default_factory=dict)


def factorize_(
    model: nn.Module,
    allocation: Allocation,
    *,
    optimizers: Iterable[Optimizer] | Optimizer = (),
    optimizer_state: OptimizerState = "reset",
    importance: Mapping[str, Importance] | None = None,
) -> SurgeryReport:
    """Carry out an allocation, in place.

    A layer that is factorized otherwise is composed and factorized anew; one that is to be dense is made dense; one
    that already is as asked stays as it is, so that doing it twice is doing it once. The bias stays the same
    parameter; device, dtype, memory format, train/eval mode, ``requires_grad`` and forward hooks are taken over.

    Args:
        model: whose layers are replaced.
        allocation: from :func:`~lr_callback.analyze.allocate` on this model, or one with the same layers.
        optimizers: edited in place: the factors join the group of their weight, state of other parameters stays.
        optimizer_state: what the factors start with: ``reset``, no state; or ``project``, the momentum of their dense
            weight through the chain rule (:mod:`lr_callback.edits.projection`), for SGD, Adam and AdamW.
        importance: what the allocation was made with, if its error is weighted by it.

    Returns:
        What was done.

    Raises:
        TypeError: If ``allocation`` is not an :class:`~lr_callback.Allocation`.
        ValueError: If the model lacks a layer of the allocation, or has it with another shape, or if
            ``optimizer_state`` is another word, or if the importance is missing or not wanted. Nothing was changed.
        RuntimeError: If an optimizer does not let its groups be edited, or cannot train the factors. Nothing was
            changed.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> sum(p.numel() for p in model.parameters()) == report.parameters_after <= 2405
        True
    """
    check_optimizer_state(optimizer_state)
    targets = check_allocation(model, allocation)
    with workers() as crew:
        made = build_layers(targets, allocation, crew, importance=importance)
    return replace_layers(model, made, optimizers, optimizer_state=optimizer_state)


def densify_(model: nn.Module, *, optimizers: Iterable[Optimizer] | Optimizer = ()) -> SurgeryReport:
    """Multiply the factors of every factorized layer back, in place.

    Args:
        model: whose layers are replaced.
        optimizers: edited in place.

    Returns:
        What was done.

    Raises:
        ValueError: If the model itself is a factorized layer, or one cannot be replaced. Nothing was changed.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> densify_(model).densified
        ('0',)
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    if "" in layers:
        raise ValueError("`model` is a factorized layer itself, not one that holds it; take `model.to_dense()`.")
    for name, reason in find_layers(model).skipped.items():
        if name in layers:
            raise ValueError(f"{name}: it cannot be made dense, {reason}. Nothing was changed.")
    return replace_layers(model, {name: densified(layer) for name, layer in layers.items()}, optimizers)


def replace_layers(
    model: nn.Module,
    made: Mapping[str, nn.Module],
    optimizers: Iterable[Optimizer] | Optimizer = (),
    undo: ExitStack | None = None,
    optimizer_state: OptimizerState = "reset",
) -> SurgeryReport:
    """Swap layers under all of their names, and let optimizers follow; undo both if anything interrupts it.

    Args:
        model: whose layers are replaced.
        made: name of a layer -> the layer that takes its place.
        optimizers: edited in place.
        undo: given what undoes the whole, before anything is changed, for a caller with more to do that may fail; the
            surgery is then undone unless the caller takes everything off the stack.
        optimizer_state: ``reset`` or ``project``, for dense layers that become factors; all others start without.

    Raises:
        RuntimeError: If an optimizer does not let its groups be edited. Nothing was changed.
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    before = sum(parameter.numel() for parameter in model.parameters())
    old = {name: model.get_submodule(name) for name in made}
    replacements = _replacements(old, made)
    heirs = {layer: made[name] for name, layer in old.items()}
    places = _places(places_of(model, heirs), heirs)
    with ExitStack() as own:
        steps = own if undo is None else undo  # never moved from one to the other: an interrupt could come in between
        steps.callback(_put_back, places)
        projected = _heirs_of_dense(old, made) if optimizer_state == "project" else {}
        replace_parameters(listed, replacements, _names_of_new(made), projected, steps)
        for parent, child, _, new in places:
            parent._modules[child] = new
        report = replace(_report(model, made, before), replacements=replacements, replaced=old)
        own.pop_all()
    return report


def _put_back(places: Sequence[_Place]) -> None:
    for parent, child, former, _ in places:
        parent._modules[child] = former


@contextmanager
def standing_in(
    model: nn.Module, instead: Mapping[nn.Module, nn.Module], known: Places | None = None
) -> Iterator[None]:
    """Let other layers stand in the places of some, for a while; nothing else of them is taken over.

    Args:
        model: that holds the layers.
        instead: layer -> the one that stands in for it.
        known: where these layers stand, and others may; None: it is looked for in the whole model.
    """
    places = _places(places_of(model, instead) if known is None else known, instead)
    try:
        for parent, child, _, other in places:
            parent._modules[child] = other
        yield
    finally:
        _put_back(places)


def keep_places(model: nn.Module, undo: ExitStack) -> None:
    """Have every module of a model put back into its place, if it comes to that.

    What stands in for layers for a while is gone after that while: but not if its very end was interrupted.
    """
    for parent in model.modules():
        for child, module in parent._modules.items():
            undo.callback(parent._modules.__setitem__, child, module)


def _report(model: nn.Module, made: Mapping[str, nn.Module], before: int) -> SurgeryReport:
    return SurgeryReport(
        factorized=tuple(name for name, layer in made.items() if isinstance(layer, FactorizedLayer)),
        densified=tuple(name for name, layer in made.items() if not isinstance(layer, FactorizedLayer)),
        unchanged=tuple(
            name for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer) and name not in made
        ),
        parameters_before=before,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
    )


def places_of(model: nn.Module, layers: Container[nn.Module]) -> Places:
    """Return every place where each of some layers stands."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, layer in parent._modules.items():
            if layer is not None and layer in layers:
                places.setdefault(layer, []).append((parent, child))
    return places


def _places(places: Places, new: Mapping[nn.Module, nn.Module]) -> list[_Place]:
    return [(parent, child, layer, other) for layer, other in new.items() for parent, child in places.get(layer, ())]


def _replacements(old: Mapping[str, nn.Module], made: Mapping[str, nn.Module]) -> Replacements:
    """Pair the old weights with the new: one with two factors, two factors with one weight, or two with two."""
    pairs: dict[nn.Parameter, Sequence[nn.Parameter]] = {}
    for name, layer in old.items():
        before, after = weights_held(layer), weights_held(made[name])
        if len(before) == len(after):
            pairs.update({one: (other,) for one, other in zip(before, after, strict=True)})
        else:
            pairs.update(dict.fromkeys(before[1:], ()))
            pairs[before[0]] = after
    return pairs


def _heirs_of_dense(old: Mapping[str, nn.Module], made: Mapping[str, nn.Module]) -> dict[nn.Parameter, FactorizedLayer]:
    """Pair the weight of each dense layer with the factorized one in its place."""
    return {
        weights_held(old[name])[0]: layer
        for name, layer in made.items()
        if isinstance(layer, FactorizedLayer) and not isinstance(old[name], FactorizedLayer)
    }


def _names_of_new(made: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    return {
        parameter: f"{name}.{inner}" for name, layer in made.items() for inner, parameter in layer.named_parameters()
    }
