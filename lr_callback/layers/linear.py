"""Linear: nn.Linear and the Conv1D of transformers, which is one with its weight the other way round."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from lr_callback.layers.base import FactorizedLayer, any_weight, dense_bias
from lr_callback.mathematics.folding import Geometry


class SlicedLinear(nn.Module):
    """Apply one bias-free linear map to each slice of the features: a Linear with groups.

    Args:
        in_features: divisible by ``num_slices``.
        out_features: divisible by ``num_slices``.
        num_slices: number of equal parts of the input and of the output.
        device: of the weight.
        dtype: of the weight.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``, weight ``(out_features, in_features / num_slices)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_slices: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_slices = in_features, out_features, num_slices
        self.weight = nn.Parameter(torch.empty(out_features, in_features // num_slices, device=device, dtype=dtype))
        self.register_parameter("bias", None)  # code that initializes Linear layers asks for it
        if self.weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Apply each slice's map."""
        # One batched product with the slices as its batch, however many leading dimensions there are.
        width = self.weight.shape[1]
        sliced = features.reshape(-1, self.num_slices, width).transpose(0, 1)
        mapped = torch.bmm(sliced, self.weight.reshape(self.num_slices, -1, width).mT).transpose(0, 1)
        # Sizes are added to sizes: neither TorchScript nor fx can unpack them.
        return mapped.reshape(features.shape[:-1] + self.weight.shape[:1])

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, num_slices={self.num_slices}"


def _linear_encoder(in_features: int, out_features: int, num_slices: int, dtype: torch.dtype) -> nn.Module:
    """Return an encoder on the meta device; of one slice an ``nn.Linear``, which quantization and adapters look for."""
    if num_slices == 1:
        return nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    return SlicedLinear(in_features, out_features, num_slices, device="meta", dtype=dtype)


class _FactorizedMap(FactorizedLayer):
    """A linear map of features as two."""

    def _factors(self, dense: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
        like, sizes, width = any_weight(dense), self.geometry(self), self.num_slices * rank
        encoder = _linear_encoder(sizes.in_channels, width, self.num_slices, like.dtype)
        has_bias = dense_bias(dense) is not None
        decoder = nn.Linear(width, sizes.out_channels, bias=has_bias, device="meta", dtype=like.dtype)
        return encoder.to_empty(device=like.device), decoder.to_empty(device=like.device)


class FactorizedLinear(_FactorizedMap):
    """A Linear as two: ``num_slices`` small maps side by side, then one over all of their outputs.

    Args:
        dense: a Linear whose configuration is taken over (sizes, bias, device, dtype); its weights are not read.
        num_slices: ``k``, divides ``in_features``.
        rank: ``j`` per slice.
        folding: for uniformity; a Linear has one folding.

    Example::

        >>> layer = FactorizedLinear(nn.Linear(12, 5), num_slices=3, rank=2)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(7, 12)).shape
        (torch.Size([6, 4]), torch.Size([5, 6]), torch.Size([7, 5]))
    """

    attributes = ("in_features", "out_features")
    in_features: int
    out_features: int

    @classmethod
    def geometry(cls, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight."""
        assert isinstance(layer, (nn.Linear, FactorizedLinear))
        return Geometry(layer.out_features, layer.in_features)

    def dense_skeleton(self) -> nn.Module:
        """Return an ``nn.Linear`` of the same sizes."""
        like, has_bias = any_weight(self), self.bias is not None
        made = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta", dtype=like.dtype)
        return made.to_empty(device=like.device)


class FactorizedConv1D(_FactorizedMap):
    """A ``transformers.pytorch_utils.Conv1D`` as two; its ``weight`` is ``(in, out)``, its factors are a Linear's.

    Args:
        dense: a Conv1D whose configuration is taken over; its weights are not read.
        num_slices: ``k``, divides ``nx``.
        rank: ``j`` per slice.
        folding: for uniformity; it has one folding.
    """

    swapped = frozenset({"dense"})
    attributes = ("nf", "nx")
    argument = "x"
    nf: int
    nx: int

    @classmethod
    def geometry(cls, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight."""
        out_features, in_features = layer.nf, layer.nx
        assert isinstance(out_features, int) and isinstance(in_features, int)
        return Geometry(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the encoder, then the decoder; the argument is named as in transformers."""
        outputs: Tensor = self.decoder(self.encoder(x))  # TorchScript knows no super()
        return outputs

    def dense_skeleton(self) -> nn.Module:
        """Return a Conv1D of the same sizes; only this needs transformers."""
        like = any_weight(self)
        with torch.device("meta"):
            made: nn.Module = import_module("transformers.pytorch_utils").Conv1D(self.nf, self.nx)
        return made.to(like.dtype).to_empty(device=like.device)
