"""Every form of a factorized layer computes the same, for every type, folding and grouping where there are several."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.layers.layer_types import build, layer_type
from lr_callback.mathematics.folding import FOLDINGS
from lr_callback.tuning.forms import forms_of, in_form

TOLERANCE = 1e-10
PLAIN, TRANSPOSED = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
law = settings(max_examples=25, deadline=None)


def convolution(draw, kind, groups, num_slices):
    axes = (PLAIN + TRANSPOSED).index(kind) % 3 + 1

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    options = {"dilation": each(1, 2), "stride": each(1, 2), "padding": each(0, 1), "groups": groups}
    if kind in PLAIN:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    channels = groups * num_slices * 2, groups * num_slices * 2
    layer = kind(*channels, each(1, 3), bias=draw(st.booleans()), **options)
    return layer, torch.randn(2, channels[0], *each(5, 6), dtype=torch.float64)


def sliced(draw, kind, groups):
    """Draw a factorized layer of several slices, with random factors, that also has a form in one block; an input."""
    torch.manual_seed(draw(st.integers(0, 99)))
    num_slices, rank = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    if kind in PLAIN + TRANSPOSED:
        dense, inputs = convolution(draw, kind, groups, num_slices)
    else:
        width = 4 * num_slices
        dense, inputs = kind(width, width), torch.randn(*draw(st.sampled_from([(3,), (2, 3)])), width).double()
    choice = lrc.Factorization(draw(st.sampled_from(list(FOLDINGS))), num_slices, rank, 0.0, 0, 1)
    layer = build(dense.double(), choice)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return dense, layer, inputs


def empty(layer):
    """Return the dense layer of the same configuration with other weights."""
    made = layer.to_dense()
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def near(found, wanted):
    return found.shape == wanted.shape and float((found - wanted).norm()) <= TOLERANCE * (1 + float(wanted.norm()))


@pytest.mark.parametrize(
    ("kind", "groups"),
    [("Linear", 1), ("Conv1D", 1), *((kind.__name__, groups) for kind in PLAIN + TRANSPOSED for groups in (1, 2))],
)
@law
@given(data=st.data())
@torch.no_grad()
def test_all_forms_of_a_layer_compute_the_same_and_restore(kind, groups, data):
    known = pytest.importorskip("transformers.pytorch_utils") if kind == "Conv1D" else nn
    dense, layer, inputs = sliced(data.draw, getattr(known, kind), groups)
    assert list(forms_of(layer)) == ["as built", "one block", "dense"]
    wanted = layer(inputs)
    for form, structure in forms_of(layer).items():
        made = nn.Sequential(in_form(layer, form))
        assert near(made(inputs), wanted)
        assert near(made[0].weight, layer.weight)
        if structure is not None:
            assert (made[0].folding, made[0].num_slices, made[0].rank) == structure
            assert layer_type(made[0]).geometry(made[0]) == layer_type(dense).geometry(dense)
        fresh = nn.Sequential(empty(layer))
        lrc.restore_(fresh, made.state_dict())
        assert near(fresh(inputs), wanted)
        assert [one.shape for one in fresh.parameters()] == [one.shape for one in made.parameters()]
