"""Embedding: a smaller table, then a map of what it gives; a table is a Linear on one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.layers.base import FactorizedLayer, any_weight, weight_of
from lr_callback.mathematics.folding import Geometry


class FactorizedEmbedding(FactorizedLayer):
    """An Embedding as two: a table of ``rank`` numbers for each index, then a Linear.

    Args:
        dense: an Embedding whose configuration is taken over; its weights are not read.
        num_slices: 1: slices of the indices would each need a lookup of their own.
        rank: ``j``, width of the table.
        folding: for uniformity; it has one folding.

    The row of ``padding_idx`` is zero in the table, and so in the output; it has no gradient.

    Example::

        >>> layer = FactorizedEmbedding(nn.Embedding(100, 16, padding_idx=0), num_slices=1, rank=4)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.tensor([[1, 2, 3]])).shape
        (torch.Size([100, 4]), torch.Size([16, 4]), torch.Size([1, 3, 16]))
    """

    swapped = frozenset({"dense", "encoder"})
    attributes = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    works = "by lookup"
    has_patches = False
    only_if_asked = "an embedding; set `embeddings=True` to factorize it"
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """Return why an Embedding cannot be factorized, None if it can."""
        assert isinstance(dense, nn.Embedding)
        if dense.max_norm is not None:
            return f"max_norm={dense.max_norm}: it changes rows of its weight as it looks them up"
        if dense.padding_idx is not None and dense.weight.detach()[dense.padding_idx].any():
            return f"its row padding_idx={dense.padding_idx} is not zero: it is fixed, and would move with the decoder"
        return None

    @classmethod
    def geometry(cls, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight, as those of a Linear on one-hot vectors."""
        assert isinstance(layer, (nn.Embedding, FactorizedEmbedding))
        return Geometry(layer.embedding_dim, layer.num_embeddings, sliceable=False)

    @classmethod
    def patches(cls, layer: nn.Module, inputs: Tensor, outputs: Tensor, chosen: Tensor | None = None) -> Tensor | None:
        """Return None: the inputs are indices."""
        return None

    def _factors(self, dense: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
        like = any_weight(dense)
        decoder = nn.Linear(rank, self.embedding_dim, bias=False, device="meta", dtype=like.dtype)
        return self._table(like, rank), decoder.to_empty(device=like.device)

    def _table(self, like: nn.Parameter, width: int) -> nn.Module:
        made = nn.Embedding(
            self.num_embeddings,
            width,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
            dtype=like.dtype,
        ).to_empty(device=like.device)
        with torch.no_grad():
            weight_of(made)[[] if self.padding_idx is None else [self.padding_idx]] = 0
        return made

    def dense_skeleton(self) -> nn.Module:
        """Return an ``nn.Embedding`` of the same configuration."""
        return self._table(any_weight(self), self.embedding_dim)
