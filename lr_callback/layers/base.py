"""Base: what all factorized layers have in common, and what the rest of the package asks about each type.

A new layer type is a subclass of :class:`FactorizedLayer` and one row in the table of
:mod:`lr_callback.layers.layer_types`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import getmembers
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lr_callback.decisions.costs import Call, Works
from lr_callback.mathematics.folding import Geometry, compose, swap_channels, swapped_shape

Part = Literal["dense", "encoder", "decoder"]
"""A layer's dense weight, or one of its factors."""


class FactorizedLayer(nn.Module, ABC):
    """A layer as two: an encoder over slices of the input channels, then a decoder that owns the bias.

    The class also answers for the dense layers that it stands for, so that one table of classes is all that there is.

    Args:
        dense: a layer of the configuration to take over, dense or factorized; its weights are not read.
        num_slices: ``k``, equal parts of the input channels of each group.
        rank: ``j``, per slice.
        folding: which kernel axes the decoder has.

    Attributes:
        swapped: the weights that this type holds with their input channels first.
        attributes: names of what is taken over from the dense layer, for code around it that reads them.
        argument: name of the dense layer's argument, for calls by name.
        works: where the dense layer's multiply-adds arise.
        only_if_asked: why the type is left out unless an argument asks for it; None: it is not.
        has_patches: whether its inputs are numbers, which :meth:`patches` gives.
    """

    swapped: ClassVar[frozenset[Part]] = frozenset()
    attributes: ClassVar[tuple[str, ...]] = ()
    argument: ClassVar[str] = "input"
    works: ClassVar[Works] = "at outputs"
    only_if_asked: ClassVar[str | None] = None
    has_patches: ClassVar[bool] = True

    __jit_unused_properties__: ClassVar[list[str]]

    def __init_subclass__(cls, **options: object) -> None:
        """Keep TorchScript from compiling the properties: only ``forward`` is what a layer computes."""
        super().__init_subclass__(**options)
        cls.__annotations__ = {}  # for type checkers; TorchScript would read them, and understand none
        cls.__jit_unused_properties__ = [name for name, _ in getmembers(cls, lambda one: isinstance(one, property))]

    def __init__(self, dense: nn.Module, num_slices: int, rank: int, folding: str = "kernel_in_encoder") -> None:
        super().__init__()
        self.folding, self.num_slices = folding, num_slices
        for name in self.attributes:
            setattr(self, name, getattr(dense, name))
        self.encoder, self.decoder = self._factors(dense, rank)

    @classmethod
    def own_attributes(cls) -> set[str]:
        """Return the names of what a layer of this type is given when made; what else it has is the user's."""
        return {"folding", "num_slices", *cls.attributes}

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """Return why a dense layer of this type cannot be factorized, None if it can."""
        return None

    @classmethod
    @abstractmethod
    def geometry(cls, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight of a dense or factorized layer of this type."""

    @classmethod
    def call(cls, inputs: Tensor, outputs: Tensor) -> Call:
        """Describe one observed call."""
        return Call(outputs.shape[:-1].numel())

    @classmethod
    def patches(cls, layer: nn.Module, inputs: Tensor, outputs: Tensor, chosen: Tensor | None = None) -> Tensor | None:
        """Return what the weight of a dense or factorized layer is multiplied with in one call.

        Args:
            layer: of this type.
            inputs: of the call.
            outputs: of the call; only their shape matters.
            chosen: indices of positions, in the order of :meth:`results`; None: all.

        Returns:
            ``(g, positions, C / g * prod(kernel))``, the last axis in the order of the weight's; None for a type whose
            inputs are no numbers.
        """
        rows = inputs.reshape(1, -1, inputs.shape[-1])
        return rows if chosen is None else rows[:, chosen]

    @classmethod
    def positions(cls, layer: nn.Module, inputs: Tensor) -> Tensor:
        """Return the inputs of one call position by position, ``(g, positions, C / g)``, whatever the kernel."""
        return inputs.reshape(1, -1, inputs.shape[-1])

    @classmethod
    def results(cls, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return the outputs of one call position by position, ``(g, positions, F / g)``, in order of the patches."""
        return outputs.reshape(1, -1, outputs.shape[-1])

    @abstractmethod
    def _factors(self, dense: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
        """Return encoder and decoder, their weights not set; draws no random numbers."""

    @abstractmethod
    def dense_skeleton(self) -> nn.Module:
        """Return the dense layer of the same configuration, its weights not set; draws no random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the encoder, then the decoder; the argument is named as in torch, for calls by name."""
        outputs: Tensor = self.decoder(self.encoder(input))
        return outputs

    @classmethod
    def relaid(cls, part: Part, weight: Tensor, groups: int) -> Tensor:
        """Bring a weight from this type's order of axes to that of :mod:`lr_callback.mathematics.folding`, or back."""
        return swap_channels(weight, groups) if part in cls.swapped else weight

    @classmethod
    def relaid_shape(cls, part: Part, shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
        """Return the shape that :meth:`relaid` gives a weight of a shape."""
        return swapped_shape(shape, groups) if part in cls.swapped else shape

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The weights of encoder and decoder, as this type holds them."""
        return weight_of(self.encoder), weight_of(self.decoder)

    @property
    def ordered_factors(self) -> tuple[Tensor, Tensor]:
        """The weights of encoder and decoder in the order of :mod:`lr_callback.mathematics.folding`; differentiable."""
        return self.in_own_order(*self.factors)

    def in_own_order(self, encoder: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
        """Bring factors from the order of :mod:`lr_callback.mathematics.folding` to that of this type, or back."""
        groups = self.geometry(self).groups
        of_encoder = self.relaid("encoder", encoder, groups * self.num_slices)
        return of_encoder, self.relaid("decoder", decoder, groups)

    @torch.no_grad()
    def set_factors(self, encoder: Tensor, decoder: Tensor) -> None:
        """Set the values of the factors, given in the order of :mod:`lr_callback.mathematics.folding`."""
        for factor, value in zip(self.factors, self.in_own_order(encoder, decoder), strict=True):
            factor.copy_(value)

    @property
    def rank(self) -> int:
        """Singular values kept per slice."""
        decoder = self.relaid_shape("decoder", tuple(self.factors[1].shape), self.geometry(self).groups)
        return decoder[1] // self.num_slices

    @property
    def structure(self) -> tuple[str, int, int]:
        """Folding, number of slices and rank: which of the forms of its dense layer it is."""
        return self.folding, self.num_slices, self.rank

    @property
    def ordered_weight(self) -> Tensor:
        """The product of the factors, ordered as in :mod:`~lr_callback.mathematics.folding`; differentiable."""
        return compose(*self.ordered_factors, self.num_slices, self.geometry(self).groups)

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shaped as the dense weight; differentiable, made anew at each use."""
        return self.relaid("dense", self.ordered_weight, self.geometry(self).groups)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, held by the decoder."""
        return _bias_of(self.decoder)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Multiply the factors back: return the dense layer, with a copy of the bias."""
        dense = self.dense_skeleton()
        weight_of(dense).copy_(self.weight)
        bias = _bias_of(dense)
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe the structure."""
        return f"folding={self.folding}, num_slices={self.num_slices}, rank={self.rank}"


def dense_bias(layer: nn.Module) -> nn.Parameter | None:
    """Return the bias of a dense or factorized layer, None for a type that has none."""
    return layer.bias if isinstance(layer, FactorizedLayer) else _bias_of(layer)


def any_weight(layer: nn.Module) -> nn.Parameter:
    """Return a weight with the device, dtype and memory format of a dense or factorized layer."""
    return layer.factors[0] if isinstance(layer, FactorizedLayer) else weight_of(layer)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a dense layer."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _bias_of(layer: nn.Module) -> nn.Parameter | None:
    bias = getattr(layer, "bias", None)
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias
