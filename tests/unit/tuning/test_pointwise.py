"""Linear layers as convolutions of one pixel compute the same, are the same parameters, and can go back."""

import pickle
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import lr_callback as lrc
from lr_callback.tuning.pointwise import PointwiseLinear, make_pointwise, pointwise_


@given(leading=st.lists(st.integers(0, 4), max_size=3), has_bias=st.booleans(), transposed=st.booleans())
def test_outputs_and_gradients_are_those_of_the_linear(leading, has_bias, transposed):
    torch.manual_seed(0)
    layer, rows = nn.Linear(6, 5, bias=has_bias), torch.randn(*leading, 6)
    if transposed and len(leading) > 1:
        rows = rows.transpose(0, 1).contiguous().transpose(0, 1)
    found = []
    for _ in range(2):
        layer.zero_grad()
        given_rows = rows.clone().requires_grad_()
        outputs = layer(given_rows)
        outputs.square().sum().backward()
        found.append([outputs.detach(), given_rows.grad, *(one.grad for one in layer.parameters())])
        pointwise_(layer)
    assert type(layer) is PointwiseLinear
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


def compressed():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    lrc.factorize_(model, lrc.allocate(model, 0.8, method=lrc.ALDS(max_slices=1), overrides={"2": "dense"}))
    return model


def test_factors_and_dense_layers_change_and_nothing_that_is_saved():
    model, rows = compressed(), torch.randn(3, 7, 64)
    expected, before, parameters = model(rows), model.state_dict(), list(model.parameters())
    assert pointwise_(model) == ("0.encoder", "0.decoder", "2")
    assert pointwise_(model) == ()
    assert torch.allclose(model(rows), expected, atol=1e-5)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    fresh = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    pointwise_(fresh)
    lrc.restore_(fresh, before)
    assert torch.equal(fresh(rows), expected)
    assert pointwise_(fresh) == ("0.encoder", "0.decoder")


def test_one_may_compress_further_after_it():
    model = compressed()
    pointwise_(model)
    report = lrc.factorize_(model, lrc.allocate(model, 0.3))
    assert set(report.factorized) == {"0", "2"}


def test_what_a_convolution_does_not_make_faster_stays():
    attention, own = nn.MultiheadAttention(8, 2), parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleList(
        [attention, own, nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, device="meta"), nn.Conv2d(1, 1, 1)]
    )
    assert pointwise_(model) == ()


class Quantized(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning", "ignore:Initializing zero-element tensors:UserWarning")
def test_weights_that_no_convolution_takes_stay():
    own, sparse = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    own.weight = nn.Parameter(own.weight.detach().as_subclass(Quantized))  # as torchao's are
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse_csr(), requires_grad=False)
    model = nn.ModuleList([own, sparse, nn.Linear(4, 0)])
    assert pointwise_(model) == ()


def test_outputs_are_laid_out_as_those_of_the_linear():
    layer = nn.Linear(6, 4)
    pointwise_(layer)
    assert layer(torch.randn(7, 3, 6).transpose(0, 1)).view(-1).shape == (84,)


def test_nested_inputs_and_graphs_of_fx():
    model, rows = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 5, 6)
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged)
    expected, of_nested = model(rows), model(nested)
    pointwise_(model)
    assert all(map(torch.equal, model(nested).unbind(), of_nested.unbind()))
    traced = torch.fx.symbolic_trace(model)
    assert torch.allclose(traced(rows), expected, atol=1e-6)
    assert torch.equal(traced(rows[0]), model(rows[0]))


def test_for_a_while_also_where_that_ends_early():
    model = compressed()
    kinds = [type(one) for one in model.modules()]
    with pytest.raises(KeyboardInterrupt), ExitStack() as undo:
        make_pointwise(model, undo)
        assert pointwise_(model) == ()
        raise KeyboardInterrupt
    assert [type(one) for one in model.modules()] == kinds


def test_what_was_so_before_stays_so():
    model = compressed()
    pointwise_(model[0])
    with ExitStack() as undo:
        make_pointwise(model, undo)
    assert [type(one) for one in (model[0].encoder, model[2])] == [PointwiseLinear, nn.Linear]


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
def test_graphs_pickles_and_autocast():
    layer, rows = nn.Linear(6, 4), torch.randn(3, 5, 6)
    expected = layer(rows)
    pointwise_(layer)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(layer, (rows,), dynamic_shapes=(sizes,)).module()
    for made in (
        torch.jit.script(layer),
        exported,
        torch.compile(layer, fullgraph=True),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert torch.allclose(made(rows), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
