"""The treatment: what is done to every model of the zoo, and must hold for each."""

from __future__ import annotations

import re
import resource
from collections import Counter
from collections.abc import Iterable, Mapping
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import lr_callback as lrc
from benchmarks.zoo.case import Case
from lr_callback.analysis.analyze import analyze
from lr_callback.decisions.analysed import Analysis
from lr_callback.layers import FactorizedLayer
from lr_callback.model.find import factorized_in, find_layers

KEEP_RATIO = 0.5
TOLERANCE = 1e-3
"""Largest difference of an output of factors and of their product, relative to the largest entry of that output."""


def treat(case: Case) -> dict[str, Any]:
    """Cut a model in half, run it in both modes, write it, read it, and make it dense again.

    Returns:
        The row of the model: what was found and measured.

    Raises:
        AssertionError: If something does not hold.
    """
    torch.manual_seed(0)
    model = case.make()
    names = list(model.state_dict())
    trained = trained_parameters(model, case)
    start = process_time()
    analysis = analyzed(model)
    seconds = process_time() - start
    allocation = analysis.allocate(nearest(analysis))
    own = sum(parameter.numel() for parameter in model.parameters())
    report = lrc.factorize_(model, allocation)
    check(own == allocation.dense_cost, f"{allocation.dense_cost} parameters counted, the model has {own}")
    check(report.parameters_after == allocation.cost, f"{allocation.cost} reported, {report.parameters_after} built")
    outputs = evaluate(model, case)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = check_training(model, case, trained)
    del model
    difference = check_round_trip(case, state, outputs, names)
    return {
        "parameters": own,
        "layers": len(allocation.layers) + len(allocation.skipped),
        "factorized": len(allocation.factorized),
        "stay_dense": sum(one is None for one in allocation.layers.values()),
        "skipped": counted(allocation.skipped.values()),
        "keep_ratio": round(allocation.keep_ratio, 4),
        "kept": round(allocation.cost / allocation.dense_cost, 4),
        "worst_error": round(allocation.worst_error, 4),
        "not_trained": untrained,
        "difference": float(f"{difference:.1e}"),
        "processor_seconds": round(seconds, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


class NothingToFactorizeError(Exception):
    """The model has no layer that can be factorized, and the analysis says so.

    Args:
        row: of the model.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__("nothing to factorize")
        self.row = row


def analyzed(model: nn.Module) -> Analysis:
    """Analyse a model.

    Raises:
        NothingToFactorizeError: If it has nothing to factorize.
    """
    try:
        return analyze(model)
    except ValueError as error:
        if not str(error).startswith("Nothing to factorize"):
            raise
        reasons = find_layers(model).skipped.values()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        raise NothingToFactorizeError(
            {"parameters": parameters, "layers": len(reasons), "skipped": counted(reasons)}
        ) from error


def nearest(analysis: Analysis) -> float:
    """Return the reachable ratio that is nearest to a half."""
    return max(KEEP_RATIO, analysis.reachable[0])


def counted(reasons: Iterable[str]) -> dict[str, int]:
    """Count reasons, without the names of layers in them."""
    return dict(Counter(re.sub(r"(tied to that of) .*", r"\1 another layer", reason) for reason in reasons))


def check(holds: bool, otherwise: str) -> None:
    """Raise unless something holds; unlike ``assert`` also with ``python -O``."""
    if not holds:
        raise AssertionError(otherwise)


def evaluate(model: nn.Module, case: Case) -> list[Tensor]:
    """Return the outputs in eval mode, finite."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = [output.clone() for output in case.call(model)]
    check(all(bool(output.isfinite().all()) for output in outputs), "an output in eval mode is not finite")
    return outputs


def forward_backward(model: nn.Module, case: Case) -> None:
    """Run a model forward in train mode, and backward."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    losses = [output.float().square().mean() for output in case.call(model) if output.requires_grad]
    check(bool(losses), "no output in train mode has a gradient")
    loss = torch.stack(losses).sum()
    check(bool(loss.isfinite()), f"the loss is {loss}")
    loss.backward()


def trained_parameters(model: nn.Module, case: Case) -> set[str]:
    """Return the names of the parameters that get a gradient while the model is dense."""
    forward_backward(model, case)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.grad is not None}
    model.zero_grad()
    return names


def check_training(model: nn.Module, case: Case, trained: set[str]) -> int:
    """Hold the factors' gradients to be there and finite where the dense weight had one; return how many had none."""
    forward_backward(model, case)
    without = 0
    for name in factorized_in(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, FactorizedLayer)
        expected = f"{name}.weight" in trained
        without += not expected
        for factor, of in zip(layer.factors, ("encoder", "decoder"), strict=True):
            found = factor.grad is not None
            check(found == expected, f"{name}: {of} has a gradient: {found}; the dense weight had one: {expected}")
            check(factor.grad is None or bool(factor.grad.isfinite().all()), f"{name}: {of}'s gradient is not finite")
    model.zero_grad()
    return without


def check_round_trip(case: Case, state: Mapping[str, Tensor], outputs: list[Tensor], names: list[str]) -> float:
    """Restore a fresh model from a state dict; the same bits come out of it. Then make it dense again.

    Returns:
        The largest difference of the outputs after that, relative to the largest entry of an output.
    """
    torch.manual_seed(1)
    fresh = case.make()
    lrc.restore_(fresh, state)
    restored = evaluate(fresh, case)
    check(same(outputs, restored), "a fresh model with the same state dict gives other outputs")
    if case.selects:
        outputs = evaluate(fresh.double(), case)
    lrc.densify_(fresh)
    check(not factorized_in(fresh), "a layer is still factorized")
    check(list(fresh.state_dict()) == names, "the names in the state dict are not those of the dense model")
    composed = evaluate(fresh, case)
    check(len(composed) == len(outputs), f"{len(outputs)} outputs of factors, {len(composed)} of their product")
    worst = max(difference(one, other) for one, other in zip(composed, outputs, strict=True))
    check(worst <= TOLERANCE, f"outputs of factors and of their product differ by {worst:.1e}")
    return worst


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether two lists of tensors are the same, bit for bit."""
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool((one == other).all()) for one, other in zip(ones, others, strict=True)
    )


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest entry; infinite if the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    scale = float(one.abs().max()) if one.numel() else 0.0
    return float((one - other).abs().max()) / scale if scale else 0.0 if same([one], [other]) else float("inf")
