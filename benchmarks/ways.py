"""Ways to bring a network to a share of its multiply-adds: those of this package, and what a user might pick instead.

A way takes a dense network, which it may change, a subject and a budget, and returns the smaller network. Each has one
knob that is searched until the network that is built, counted by :func:`multiply_adds`, is at most the budget.

Ways that replace layers take the network with its attention split (``lrc.split_attention_``): they could not replace
what ``nn.MultiheadAttention`` reads directly. torch-pruning knows that module, and takes the network as it is.

torch-pruning and tltorch are imported when they are used: ``pip install torch-pruning tensorly-torch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import lcm
from types import ModuleType
from typing import Any

from torch import Tensor, channels_last, nn
from torchvision.models import VisionTransformer

import lr_callback as lrc
from lr_callback.analysis.analyze import analyze, survey
from lr_callback.commands.study.pruning import kept_layers
from lr_callback.decisions.candidates import LayerCandidates
from lr_callback.decisions.methods.alds import best_method
from lr_callback.model.observe import observe
from lr_callback.model.pricing import Prices

STEPS = 10
"""Halvings of a knob's range."""

STRONGEST = 0.97
"""How far a knob goes at most, of 1."""


@dataclass(frozen=True)
class Subject:
    """A network, and on what it runs.

    Args:
        name: of the network.
        make: returns the dense network in eval mode, the same each time.
        batch: of images, on which networks are timed and compared.
        calibration: training batches of images and labels, where the network is a trained one.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Tensor
    calibration: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def example(self) -> Tensor:
        """One image, on which multiply-adds are counted."""
        return self.batch[:1].clone()


Way = Callable[[nn.Module, Subject, float], nn.Module]


def multiply_adds(model: nn.Module, subject: Subject) -> int:
    """Return what torch's flop counter counts of a network as it is built, halved."""
    return observe(model, subject.example).multiply_adds(model)


def low_rank(model: nn.Module, subject: Subject, ratio: float, method: lrc.Method) -> nn.Module:
    """Choose ranks by a method of this package."""
    lrc.split_attention_(model)
    allocation = lrc.allocate(model, ratio, method=method, cost="multiply_adds", example_input=subject.example)
    lrc.factorize_(model, allocation)
    return model


def pointwise(model: nn.Module, subject: Subject, ratio: float, method: lrc.Method) -> nn.Module:
    """Choose ranks by a method of this package, and let Linear layers be convolutions of one pixel."""
    if not isinstance(model, VisionTransformer):
        raise ValueError("its one Linear layer, the last, sees a single row of each image: nothing would change")
    lrc.pointwise_(low_rank(model, subject, ratio, method))
    return model


def timed(model: nn.Module, subject: Subject, ratio: float) -> nn.Module:
    """Choose ranks under a budget in time, the largest under which the multiply-adds are at most those asked.

    Times are measured on the batch, layer by layer, in the memory format that the network is compared in.
    """
    lrc.split_attention_(model)
    model, method = model.to(memory_format=channels_last), lrc.ALDS(max_slices=1)
    seen = observe(model, subject.batch, method)
    found = analyze(model, method, prices=Prices("latency", seen))
    counted = survey(model, method, prices=Prices("multiply_adds", seen))

    def size(dropped: float) -> float:
        chosen = found.allocate(1 - dropped).factorized
        saved = (counted.layers[name].dense_cost - _cost(counted.layers[name], one) for name, one in chosen.items())
        return (counted.dense_cost - sum(saved)) / (ratio * counted.dense_cost)

    _, dropped = bracket(size, min(STRONGEST, 1 - found.reachable[0]))
    lrc.factorize_(model, found.allocate(1 - dropped))
    return model


def _cost(layer: LayerCandidates, choice: lrc.Factorization) -> int:
    key = choice.folding, choice.num_slices
    return next(one.cost(choice.rank) for one in layer.candidates if (one.folding, one.num_slices) == key)


def refitted(model: nn.Module, subject: Subject, ratio: float) -> nn.Module:
    """Do what the callback does by default: ranks by activations and effects, factors refitted on training batches."""
    if not subject.calibration:
        raise ValueError("it needs training images, and the weights are random")
    lrc.split_attention_(model)
    method, batches = best_method(), subject.calibration
    moments = lrc.collect_moments(model, batches)
    known = lrc.measure_effects(model, batches[:2], method=method, importance=moments)
    counted: dict[str, Any] = {"cost": "multiply_adds", "example_input": subject.example}
    allocation = lrc.allocate(model, ratio, method=method, importance=known, **counted)
    report = lrc.factorize_(model, allocation, importance=known)
    lrc.refit_(model, report.replaced, batches, inputs="cut", factors="both", gentle=True)
    return model


def pruned(model: nn.Module, subject: Subject, ratio: float, round_to: int = 1) -> nn.Module:
    """Drop the channels of the smallest norm by torch-pruning, the same share of each layer.

    The outputs of the network stay, and so do channels that are padded by constants on their way. In a vision
    transformer the width is a multiple of the number of heads, as the library's example for torchvision has it.
    """
    library = imported("torch_pruning", "torch-pruning")
    budget = ratio * multiply_adds(model, subject)

    step = lcm(round_to, model.encoder.layers[0].num_heads if isinstance(model, VisionTransformer) else 1)

    def build(share: float) -> nn.Module:
        smaller = deepcopy(model)
        _pruner(library, smaller, subject, (share,), step).step()
        return _consistent(smaller)

    most = min(STRONGEST, max(0.0, 1 - (step + 1) / _narrowest(library, model, subject)))  # none loses all channels
    share, enough = bracket(lambda share: multiply_adds(build(share), subject) / budget, most)
    pruner = _pruner(library, model, subject, (share, enough), step)
    pruner.step()
    for group in pruner.step(interactive=True):  # of the last step no more than it takes
        group.prune()
        if multiply_adds(_consistent(model), subject) <= budget:
            break
    return model


def _call(subject: Subject) -> Callable[[nn.Module, object], object]:
    return lambda network, _: network(subject.example)


def _pruner(library: ModuleType, model: nn.Module, subject: Subject, shares: Sequence[float], step: int) -> Any:  # noqa: ANN401
    """Return a pruner that takes the named shares, one after the other."""
    return library.pruner.BasePruner(
        model,
        None,
        forward_fn=_call(subject),
        importance=library.importance.GroupMagnitudeImportance(p=2),
        iterative_steps=len(shares),
        iterative_pruning_ratio_scheduler=lambda *_: [0.0, *shares],
        ignored_layers=kept_layers(library, model, _call(subject)),
        round_to=step,
    )


def _narrowest(library: ModuleType, model: nn.Module, subject: Subject) -> int:
    """Return the width of the narrowest layer whose channels can be dropped."""
    kept = {id(layer) for layer in kept_layers(library, model, _call(subject))}
    layers = [layer for layer in model.modules() if id(layer) not in kept]
    convolutions = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    return min([*convolutions, *(layer.out_features for layer in layers if isinstance(layer, nn.Linear))])


def _consistent(model: nn.Module) -> nn.Module:
    """Let a vision transformer of torchvision know its width after pruning."""
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
    return model


def tucker(model: nn.Module, subject: Subject, ratio: float) -> nn.Module:
    """Put Tucker layers of tltorch in place of layers, of each the same fraction of its parameters.

    Convolutions keep their kernel axes; the first stays dense, as do those with kernels of 1. A ``Linear`` is seen as a
    tensor of three axes in and three out, tltorch's default; the last stays dense.
    """
    library = imported("tltorch", "tensorly-torch opt_einsum")
    lrc.split_attention_(model)
    budget = ratio * multiply_adds(model, subject)
    layers = _for_tucker(model)

    def build(dropped: float) -> nn.Module:
        smaller = deepcopy(model)
        for name, layer in layers.items():
            smaller.set_submodule(name, _tucker_layer(library, layer, 1 - dropped))
        return smaller.eval()

    dropped, enough = bracket(lambda dropped: multiply_adds(build(dropped), subject) / budget)
    smaller = build(dropped)
    for name, layer in layers.items():  # the smaller rank in no more layers than it takes
        if multiply_adds(smaller, subject) > budget:
            smaller.set_submodule(name, _tucker_layer(library, layer, 1 - enough))
    for name, layer in layers.items():
        weight: Any = smaller.get_submodule(name).weight
        fill = weight.init_from_matrix if isinstance(layer, nn.Linear) else weight.init_from_tensor
        fill(layer.weight.detach())
    return smaller


def _for_tucker(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    modules = dict(model.named_modules())
    wide = {name: one for name, one in modules.items() if isinstance(one, nn.Conv2d) and max(one.kernel_size) > 1}
    linear = {name: one for name, one in modules.items() if isinstance(one, nn.Linear)}
    return {**dict(list(wide.items())[1:]), **dict(list(linear.items())[:-1])}


def _tucker_layer(library: ModuleType, layer: nn.Conv2d | nn.Linear, rank: float) -> nn.Module:
    """Return the layer, whose factors are to be filled yet."""
    form: dict[str, Any] = {"factorization": "tucker", "implementation": "factorized", "rank": rank}
    made: nn.Module
    if isinstance(layer, nn.Conv2d):
        form |= {"fixed_rank_modes": "spatial", "decompose_weights": False}
        made = library.FactorizedConv.from_conv(layer, **form)
    else:
        shape = {"in_features": layer.in_features, "out_features": layer.out_features}
        axes = library.utils.get_tensorized_shape(**shape, order=3, min_dim=2, verbose=False)
        made = library.FactorizedLinear(*axes, bias=layer.bias is not None, **form)
    if layer.bias is not None:
        made.bias = layer.bias
    return made


def bracket(size: Callable[[float], float], most: float = STRONGEST) -> tuple[float, float]:
    """Halve the range of a knob: the last value at which a network is too large (1 is the budget), the first that fits.

    Args:
        size: of the network that the knob leads to; it falls.
        most: the largest value of the knob.

    Raises:
        ValueError: If none fits.
    """
    large, fits = 0.0, most
    least = size(fits)
    if least > 1:
        raise ValueError(f"out of its reach: {least:.2f} times the budget are left of it at the least")
    for _ in range(STEPS):
        middle = (large + fits) / 2
        large, fits = (middle, fits) if size(middle) > 1 else (large, middle)
    return large, fits


def imported(name: str, packages: str) -> ModuleType:
    """Import what only one way needs when it is needed.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} was not found; install it with: pip install {packages}") from error


OURS = "lr_callback"
IN_TIME = f'{OURS}, one slice, `cost="latency"`'
"""The one way whose budget is in time; the multiply-adds that come of it are at most those asked."""

WITH_DATA = f"{OURS}, the callback's default, refitted"
"""The one way that sees training images."""

WAYS: Mapping[str, Way] = {
    f"{OURS}, `ALDS()`": partial(low_rank, method=lrc.ALDS()),
    f"{OURS}, one slice, ranks of 16": partial(low_rank, method=lrc.ALDS(max_slices=1, rank_multiple=16)),
    f"{OURS}, one slice, ranks of 16, `pointwise_`": partial(
        pointwise, method=lrc.ALDS(max_slices=1, rank_multiple=16)
    ),
    IN_TIME: timed,
    WITH_DATA: refitted,
    "plain SVD, one fraction": partial(low_rank, method=lrc.UniformRank()),
    "torch-pruning": pruned,
    "torch-pruning, channels of 16": partial(pruned, round_to=16),
    "tltorch, Tucker": tucker,
}
"""Name -> way; a name of this package's own begins with its name."""
