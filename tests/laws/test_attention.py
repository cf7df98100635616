"""Split attention computes what the attention that it was made of does, gradients too, whatever the arguments."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")


@st.composite
def attentions(draw):
    """Draw attention of any configuration, with biases that are not zero."""
    heads, batch_first, same = draw(st.sampled_from([1, 2, 3])), draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    attention = nn.MultiheadAttention(
        heads * draw(st.integers(1, 3)),
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=None if same else draw(st.integers(1, 5)),
        vdim=None if same else draw(st.integers(1, 5)),
        batch_first=batch_first,
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return attention.train(draw(st.booleans()))


@st.composite
def inputs_for(draw, attention):
    """Draw queries, keys and values, batched or not, the same tensor for all three or not; and the sizes N, L, S."""
    samples, rows = draw(st.sampled_from([None, 1, 2, 3])), draw(st.integers(1, 4))
    own = attention.kdim == attention.vdim == attention.embed_dim and draw(st.booleans())
    columns = rows if own else draw(st.integers(1, 5))

    def made(length, width):
        shape = [length] if samples is None else [samples, length] if attention.batch_first else [length, samples]
        return torch.randn(*shape, width, dtype=attention.out_proj.weight.dtype, requires_grad=True)

    query = made(rows, attention.embed_dim)
    given = [query] * 3 if own else [query, made(columns, attention.kdim), made(columns, attention.vdim)]
    return given, (samples, rows, columns)


@st.composite
def masks(draw, sizes, heads, dtype):
    """Draw masks of every kind that leave each query the first key."""
    samples, rows, columns = sizes

    def made(shape):
        mask = torch.rand(shape) < 0.4
        mask[..., 0] = False
        return mask if draw(st.booleans()) else torch.randn(shape, dtype=dtype).masked_fill(mask, float("-inf"))

    options, kind = {}, draw(st.sampled_from(["none", "2-D", "3-D", "causal"]))
    if kind == "causal":
        options = {"attn_mask": torch.ones(rows, columns, dtype=torch.bool).triu(1), "is_causal": True}
    elif kind != "none":
        options["attn_mask"] = made((rows, columns) if kind == "2-D" else ((samples or 1) * heads, rows, columns))
    if draw(st.booleans()):
        options["key_padding_mask"] = made((columns,) if samples is None else (samples, columns))
    return {**options, "need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}


def gradients(module, inputs, outputs):
    """Return the gradients of the inputs, and of all weights as the attention has them."""
    scores = sum((one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view_as(one)).sum() for one in outputs)
    wanted = [*dict.fromkeys(inputs), *module.parameters()]
    found = torch.autograd.grad(scores, wanted, allow_unused=True, materialize_grads=True)
    named = dict(zip([f"input {n}" for n in range(len(set(inputs)))], found, strict=False))
    return named, dict(zip([name for name, _ in module.named_parameters()], found[len(named) :], strict=True))


def in_parts(found, attention):
    """Rename the gradients of the attention to those of its parts."""
    parts = {name: value for name, value in found.items() if name.startswith(("out_proj", "bias_"))}
    for name, value in found.items():
        if name in ("in_proj_weight", "in_proj_bias"):
            ending = name.removeprefix("in_proj_")
            parts |= {f"{part}_proj.{ending}": one for part, one in zip("qkv", value.chunk(3), strict=True)}
        elif name.endswith("_proj_weight"):
            parts[name.replace("_weight", ".weight")] = value
    return parts


@settings(max_examples=150)
@given(st.data())
def test_outputs_weights_and_gradients_are_those_of_the_attention(data):
    attention = data.draw(attentions())
    inputs, sizes = data.draw(inputs_for(attention))
    options = data.draw(masks(sizes, attention.num_heads, inputs[0].dtype))
    holder = nn.ModuleList([copy.deepcopy(attention)])
    assert lrc.split_attention_(holder) == ("0",)
    split = holder[0]
    wanted, found = attention(*inputs, **options), split(*inputs, **options)
    close = {"rtol": 0.0, "atol": TOLERANCE[inputs[0].dtype]}
    torch.testing.assert_close(found, wanted, **close)
    assert split.training == attention.training

    results = [one for one in wanted if one is not None], [one for one in found if one is not None]
    of_inputs, of_weights = gradients(attention, inputs, results[0])
    of_split_inputs, of_split_weights = gradients(split, inputs, results[1])
    scale = 10.0 * max(1.0, *(float(one.abs().max()) for one in [*of_inputs.values(), *of_weights.values()]))
    close["atol"] *= scale
    torch.testing.assert_close(of_split_inputs, of_inputs, **close)
    torch.testing.assert_close(of_split_weights, in_parts(of_weights, attention), **close)


@given(st.data())
def test_without_gradients_it_gives_what_the_fused_path_gives(data):
    attention = data.draw(attentions()).eval()
    inputs, sizes = data.draw(inputs_for(attention))
    options = data.draw(masks(sizes, attention.num_heads, inputs[0].dtype))
    split = lrc.SplitAttention(attention)
    with torch.inference_mode():
        wanted, found = attention(*inputs, **options), split(*inputs, **options)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=TOLERANCE[inputs[0].dtype])


@given(st.data(), st.booleans(), st.integers(0, 99))
def test_dropout_draws_the_same_numbers(data, need_weights, seed):
    attention = data.draw(attentions()).train()
    attention.dropout = 0.5
    inputs, _ = data.draw(inputs_for(attention))
    split, results = lrc.SplitAttention(attention), []
    for module in (attention, split):
        torch.manual_seed(seed)
        results.append((module(*inputs, need_weights=need_weights), torch.get_rng_state()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.0, atol=10 * TOLERANCE[inputs[0].dtype])
    assert torch.equal(results[1][1], results[0][1])
