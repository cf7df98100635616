"""SplitAttention: what it refuses, and where torch takes it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lr_callback as lrc

EXACT = {"rtol": 0.0, "atol": 1e-6}


def pair(**options):
    """Return attention of 8 features with two heads, batch first, and the same split."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    return attention, lrc.SplitAttention(attention)


WORDS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


def test_it_draws_no_random_numbers_and_says_its_sizes():
    attention, _ = pair()
    state = torch.get_rng_state()
    split = lrc.SplitAttention(attention)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(split).startswith("SplitAttention(\n  embed_dim=8, num_heads=2, batch_first=True")


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([(3, 5, 8), (3, 5, 8), (3, 4, 8)], {}, "`key` and `value` the same positions"),
        ([(3, 5, 8), (5, 8), (5, 8)], {}, "must all have 2 axes, or all 3"),
        ([(8,), (8,), (8,)], {}, "must all have 2 axes, or all 3"),
        ([(3, 5, 8), (1, 5, 8), (1, 5, 8)], {}, "as many samples"),
        ([(3, 5, 8)] * 3, {"attn_mask": torch.zeros(1, 5)}, r"`attn_mask` must be of shape \[5, 5\], got \[1, 5\]"),
        ([(3, 5, 8)] * 3, {"attn_mask": torch.zeros(3, 5, 5)}, r"be of shape \[6, 5, 5\], got \[3, 5, 5\]"),
        ([(3, 5, 8)] * 3, {"key_padding_mask": torch.zeros(1, 5)}, r"must be of shape \[3, 5\], got \[1, 5\]"),
        ([(5, 8)] * 3, {"key_padding_mask": torch.zeros(1, 5)}, r"must be of shape \[5\], got \[1, 5\]"),
        ([(3, 5, 8)] * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "bool or floating point, got torch.int"),
        ([(3, 5, 8)] * 3, {"is_causal": True}, "give the mask, too"),
    ],
)
def test_what_would_be_broadcast_to_something_else_is_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        pair()[1](*map(torch.randn, inputs), **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_inputs_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(4, 8)])
    with pytest.raises(ValueError, match="give a `key_padding_mask`"):
        pair()[1](nested, nested, nested)


def test_half_of_the_weights_are_dropped_in_train_mode_and_the_rest_is_doubled():
    split, words = pair(dropout=0.5)[1], torch.randn(200, 5, 8)
    kept, wanted = split(words, words, words)[1], split.eval()(words, words, words, average_attn_weights=False)[1]
    assert kept.shape == (200, 5, 5)
    dropped = split.train()(words, words, words, average_attn_weights=False)[1]
    assert 0.47 < float((dropped == 0).double().mean()) < 0.53
    torch.testing.assert_close(dropped[dropped != 0], 2 * wanted[dropped != 0], **EXACT)
    with torch.no_grad():
        mean = torch.stack([split(words, words, words, need_weights=False)[0] for _ in range(100)]).mean(0)
        expected = split.eval()(words, words, words, need_weights=False)[0]
    assert float((mean - expected).norm() / expected.norm()) < 0.15


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(training, need_weights):
    attention, split = (one.train(training) for one in pair())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = attention(WORDS, WORDS, WORDS, key_padding_mask=PADDED, need_weights=need_weights)
        found = split(WORDS, WORDS, WORDS, key_padding_mask=PADDED, need_weights=need_weights)
    assert [one.dtype for one in found if one is not None] == [one.dtype for one in wanted if one is not None]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.02)


def test_copies_pickles_and_state_dicts():
    split = pair()[1].eval()
    wanted = split(WORDS, WORDS, WORDS)
    saved = io.BytesIO()
    torch.save(split.state_dict(), saved)
    saved.seek(0)
    other = lrc.SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    other.load_state_dict(torch.load(saved, weights_only=True))
    for one in (other, copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        torch.testing.assert_close(one(WORDS, WORDS, WORDS), wanted, rtol=0.0, atol=0.0)
    names = [f"{part}_proj.{ending}" for part in ("q", "k", "v", "out") for ending in ("weight", "bias")]
    assert list(split.state_dict()) == names


class Only(nn.Module):
    """Self attention under a padding mask, without its weights."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, words, padded):
        return self.attention(words, words, words, key_padding_mask=padded, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True, "bias": False}], ids=str)
@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("way", ["compile", "export", "script", "trace"])
def test_graphs(way, factorized, options):
    model = Only(pair(**options)[1]).eval()
    if factorized:
        lrc.factorize_(model, lrc.allocate(model, 0.7))
    wanted = model(WORDS, PADDED)
    made = {
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
        "export": lambda: torch.export.export(model, (WORDS, PADDED), dynamic_shapes=({0: BATCH}, {0: BATCH})).module(),
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, (WORDS, PADDED)),
    }[way]()
    torch.testing.assert_close(made(WORDS, PADDED), wanted, **EXACT)
    torch.testing.assert_close(made(WORDS[:2], PADDED[:2]), wanted[:2], **EXACT)


BATCH = torch.export.Dim("batch")


def test_a_script_returns_weights_where_they_are_asked_for():
    attention, split = pair()
    with pytest.warns(FutureWarning, match="is deprecated"):
        scripted = torch.jit.script(split)
    torch.testing.assert_close(scripted(WORDS, WORDS, WORDS), attention(WORDS, WORDS, WORDS), **EXACT)
    assert scripted(WORDS, WORDS, WORDS, need_weights=False)[1] is None


def test_code_that_reads_the_weights_is_not_given_others():
    split = pair()[1]
    with pytest.raises(TypeError, match="_InThreeParts"):
        nn.functional.linear(WORDS, split.in_proj_weight)
    with pytest.raises(AttributeError, match="_InThreeParts"):
        nn.init.xavier_uniform_(split.in_proj_weight)
