"""Attention: what nn.MultiheadAttention computes, from layers of its own that are called, not read.

Shapes: N samples, L queries, S keys, H heads of D features; E = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _InThreeParts:
    """What stands where ``nn.TransformerEncoder`` looks for a weight to fuse: something that it must leave alone.

    It asks for weights with a ``__torch_function__``, and takes its slow path if there is one. All else raises, and
    says the name of this class, where nothing at all would be found too late, or never.
    """

    @classmethod
    def __torch_function__(cls, *_: object) -> object:
        return NotImplemented


class SplitAttention(nn.Module):
    """Compute what an ``nn.MultiheadAttention`` computes by four ``nn.Linear``: queries, keys, values, outputs.

    Its ``forward`` takes the same arguments and returns the same. Each of the four layers is called, so that each can
    be factorized. ``F.scaled_dot_product_attention`` does the rest, the explicit softmax where the weights of the
    attention are asked for. Fused paths of ``nn.TransformerEncoder`` in eval mode, and with them nested tensors, are
    not taken: they read weights.

    Args:
        attention: whose configuration and weights are taken over. ``in_proj_weight`` and ``in_proj_bias`` are copied
            in three parts; every other parameter stays the same one. No random numbers are drawn.

    Attributes:
        q_proj: of the queries, ``(E, E)``.
        k_proj: of the keys, ``(E, kdim)``.
        v_proj: of the values, ``(E, vdim)``.
        out_proj: of the outputs, ``(E, E)``.

    Example::

        >>> attention, words = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
        >>> outputs, weights = SplitAttention(attention)(words, words, words)
        >>> torch.allclose(outputs, attention(words, words, words)[0], atol=1e-6), weights.shape
        (True, torch.Size([3, 5, 5]))
    """

    __constants__ = ("batch_first",)
    in_proj_weight = _InThreeParts()
    in_proj_bias = None  # nn.TransformerEncoderLayer takes its fused path only where there is one

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self._qkv_same_embed_dim = False  # nn.TransformerEncoder asks for it; so it makes no nested tensors
        weights, biases = _weights_in_three(attention), _in_three(attention.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.training = attention.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute outputs and weights of the attention; arguments and results are those of ``nn.MultiheadAttention``.

        Raises:
            ValueError: If shapes do not agree, a mask is neither bool nor floating point, ``is_causal`` comes without
                ``attn_mask``, or a tensor is nested.
        """
        _check_inputs(query, key, value, batch_axis=0 if self.batch_first else 1)
        queries = self._in_heads(self.q_proj(query))
        keys, values = self._in_heads(self.k_proj(key)), self._in_heads(self.v_proj(value))
        if is_causal and attn_mask is None:
            raise ValueError("SplitAttention: `is_causal` only says what `attn_mask` is, got none; give the mask, too.")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(attn_mask, key_padding_mask, queries, keys.shape[2], query)
        keys, values = self._with_more(keys, self.bias_k), self._with_more(values, self.bias_v)
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None and added > 0:
            mask = functional.pad(mask, [0, added])  # what was added is seen by all
        dropout = self.dropout if self.training else 0.0
        heads, weights = _attended(queries, keys, values, mask, dropout, causal, need_weights)
        outputs: Tensor = self.out_proj(self._joined(heads, query))
        if weights is None:
            return outputs, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return outputs, weights if query.dim() == 3 else weights.squeeze(0)

    def _in_heads(self, inputs: Tensor) -> Tensor:
        """Bring features to heads: ``(N, L, E)``, ``(L, N, E)`` or ``(L, E)`` to ``(N, H, L, D)``."""
        heads = torch.unflatten(inputs, -1, [self.num_heads, self.head_dim])
        if inputs.dim() == 2:
            heads = heads.unsqueeze(0)
        elif not self.batch_first:
            heads = heads.transpose(0, 1)
        return heads.transpose(1, 2)

    def _joined(self, heads: Tensor, query: Tensor) -> Tensor:
        """Bring heads to features, in the order of axes of the query."""
        rows = heads.transpose(1, 2)
        if query.dim() == 2:
            rows = rows.squeeze(0)
        elif not self.batch_first:
            rows = rows.transpose(0, 1)
        return rows.flatten(-2)

    def _with_more(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Add what ``add_bias_kv`` and ``add_zero_attn`` ask for after the last position."""
        if bias is not None:
            one = bias.view(1, self.num_heads, 1, self.head_dim).expand(heads.shape[0], -1, -1, -1)
            heads = torch.cat([heads, one], dim=2)
        return functional.pad(heads, [0, 0, 0, 1]) if self.add_zero_attn else heads

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


_Three = tuple[nn.Parameter | None, nn.Parameter | None, nn.Parameter | None]


def _weights_in_three(attention: nn.MultiheadAttention) -> _Three:
    if attention.in_proj_weight is not None:
        return _in_three(attention._parameters["in_proj_weight"])
    held = attention._parameters
    return held["q_proj_weight"], held["k_proj_weight"], held["v_proj_weight"]


def _in_three(parameter: nn.Parameter | None) -> _Three:
    """Return the parts of queries, keys and values as parameters of their own."""
    if parameter is None:
        return None, None, None
    parts = (nn.Parameter(part.detach().clone(), parameter.requires_grad) for part in parameter.chunk(3))
    return next(parts), next(parts), next(parts)


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    """Return a Linear that has these very parameters."""
    assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = weight  # nothing was drawn for it: on the meta device nothing is
    made.register_parameter("bias", bias)
    return made


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, batch_axis: int) -> None:
    """Refuse what would be broadcast to something else than it means."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("SplitAttention: inputs must not be nested; pad them, and give a `key_padding_mask`.")
    axes, found = query.dim(), f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
    if axes < 2 or axes > 3 or key.dim() != axes or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "SplitAttention: `query`, `key` and `value` must all have 2 axes, or all 3, and `key` and `value` the same "
            f"positions, got {found}."
        )
    if axes == 3 and query.shape[batch_axis] != key.shape[batch_axis]:
        raise ValueError(f"SplitAttention: `query` and `key` must have as many samples, got {found}.")


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, queries: Tensor, length: int, query: Tensor
) -> Tensor | None:
    """Return what is added to the scores, of a shape that broadcasts to ``(N, H, L, S)``; None: nothing is.

    Raises:
        ValueError: If a mask has another shape than those that are known, or is neither bool nor floating point.
    """
    samples, heads, rows = queries.shape[0], queries.shape[1], queries.shape[2]
    merged: Tensor | None = None
    if attn_mask is not None:
        _check_shape(
            "attn_mask", attn_mask, [rows, length] if attn_mask.dim() == 2 else [samples * heads, rows, length]
        )
        merged = _additive(attn_mask, query)
        if merged.dim() == 3:
            merged = torch.unflatten(merged, 0, [samples, heads])
    if key_padding_mask is not None:
        _check_shape("key_padding_mask", key_padding_mask, [samples, length] if query.dim() == 3 else [length])
        padding = _additive(key_padding_mask, query).reshape(samples, 1, 1, length)
        merged = padding if merged is None else merged + padding
    return merged


def _check_shape(name: str, mask: Tensor, wanted: list[int]) -> None:
    if list(mask.shape) != wanted:
        raise ValueError(f"SplitAttention: `{name}` must be of shape {wanted}, got {list(mask.shape)}.")


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as what is added to scores: True, which hides a position, is minus infinity."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"SplitAttention: masks must be bool or floating point, got {mask.dtype}.")
    return mask


def _attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return what each head takes of the values, ``(N, H, L, D)``, and if asked for how much, ``(N, H, L, S)``."""
    if not need_weights:
        return functional.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal), None
    scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-2, -1))
    weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(dim=-1)
    weights = functional.dropout(weights, dropout) if dropout > 0 else weights
    return torch.matmul(weights, values), weights
