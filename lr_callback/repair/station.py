"""Station: what stands in a layer's place while a model is refitted, for runs of before and after at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.edits.build import densified
from lr_callback.layers import weight_of
from lr_callback.layers.layer_types import layer_type
from lr_callback.repair.fitting import Fit
from lr_callback.repair.lockstep import this_walk


class Station:
    """A dense layer with the weight of the factorized one, in whose place it stands: it computes the same, faster.

    A run of the model before the cut gets the outputs of the layer before, and waits with them. One of the model as it
    stands waits with its inputs until the layer has been refitted.

    Args:
        name: of the layer.
        fit: of it.

    Attributes:
        dense: the module that stands in the layer's place.
        is_open: whether runs do not wait any more.
    """

    def __init__(self, name: str, fit: Fit) -> None:
        self.name, self.fit, self.is_open = name, fit, False
        self.dense = densified(fit.student)
        self._own = type(self.dense).forward
        vars(self.dense)["forward"] = self._forward
        kind = layer_type(self.dense)
        assert kind is not None
        self._argument = kind.argument

    def _forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        walk = this_walk()
        if walk is not None and walk.before:
            outputs: Tensor = self.fit.teacher.forward(*inputs, **named)
            walk.wait(self.name, outputs)
            return outputs
        if walk is not None and not self.is_open:
            walk.wait(self.name, inputs[0] if inputs else named[self._argument])
        built: Tensor = self._own(self.dense, *inputs, **named)
        return built

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the factors as they are now, with the shift as a bias, and let runs pass."""
        weight_of(self.dense).copy_(self.fit.student.weight)
        if self.fit.norm is not None:
            self.dense._parameters["bias"] = nn.Parameter(self.fit.shift.clone(), requires_grad=False)
        self.is_open = True
