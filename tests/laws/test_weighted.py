"""Law 2 for errors that are weighted: they are those of what is built, for inputs of the given moments."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lr_callback as lrc
from lr_callback.calibration.collect import collect_moments
from lr_callback.common.parallel import workers
from lr_callback.decisions.costs import CountedCost
from lr_callback.decisions.methods import ALDS
from lr_callback.layers.layer_types import dense_weight, layer_type
from lr_callback.mathematics.folding import FOLDINGS, fold
from lr_callback.mathematics.importance import Importance

pytestmark = pytest.mark.filterwarnings("ignore:The calibration batches are few")
law = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RESOLUTION = 1e-6


@st.composite
def layers(draw):
    """Draw a layer and inputs for it, sometimes with channels that are always zero or repeated."""
    torch.manual_seed(draw(st.integers(0, 99)))
    groups, bias = draw(st.sampled_from([1, 1, 2])), draw(st.booleans())
    channels, filters = groups * draw(st.sampled_from([1, 2, 4])), groups * draw(st.integers(1, 5))
    kind = draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d]))
    if kind is nn.Linear:
        channels = draw(st.sampled_from([1, 4, 6, 12]))
        layer, inputs = nn.Linear(channels, filters, bias=bias), torch.randn(30, channels)
    else:
        kernel = draw(st.integers(1, 3))
        layer = kind(channels, filters, kernel, stride=draw(st.integers(1, 2)), groups=groups, bias=bias)
        inputs = torch.randn(3, channels, *[6] * (1 if kind is nn.Conv1d else 2))
    inputs = inputs * torch.rand(channels).reshape(-1, *[1] * (inputs.dim() - 2)) ** 4
    if draw(st.booleans()):
        inputs[:, 0] = 0 if channels > 1 else inputs[:, 0]
        inputs[:, -1] = inputs[:, channels // 2]
    return layer.double(), inputs.double()


def built(layer, choice, importance, shrinkage=0.0):
    model = nn.Sequential(layer)
    shape, method = layer_type(layer).geometry(layer).weight_shape, ALDS("activation", shrinkage=shrinkage).to_dict()
    allocation = lrc.Allocation({"0": choice}, {}, {"0": shape}, 0, 1, 0, 1.0, error="activation", method=method)
    lrc.factorize_(model, allocation, importance={"0": importance})
    return model[0]


def varying(importance, shrinkage=0.0):
    """Return how inputs vary, where constant errors are made up for, else their second moments; part of it the same."""
    means = torch.zeros_like(importance.inputs[..., 0]) if importance.means is None else importance.means
    moments = importance.inputs - means[:, :, None] * means[:, None, :]
    groups, size, _ = moments.shape
    equal = torch.eye(size, dtype=torch.float64) * sum(one.trace() for one in moments) / (groups * size)
    return (1 - shrinkage) * moments + shrinkage * equal


def lost(residual, moments, num_slices):
    """Return what slices are off, each for its own inputs alone: the slow way."""
    groups, filters = moments.shape[0], residual.shape[0] // moments.shape[0]
    total = 0.0
    for group, matrix in enumerate(residual.reshape(groups, filters, -1)):
        width = matrix.shape[1] // num_slices
        for start in range(0, matrix.shape[1], width):
            part, own = matrix[:, start : start + width], slice(start, start + width)
            total += (part @ moments[group, own, own] @ part.T).trace().item()
    return max(total, 0.0) ** 0.5


@law
@given(layers(), st.data())
def test_activation_error_is_what_the_outputs_of_slices_are_off(case, data):
    layer, inputs = case
    importance = collect_moments(nn.Sequential(layer), [inputs])["0"]
    shrinkage = data.draw(st.sampled_from([0, 0.5, 1]))
    geometry = layer_type(layer).geometry(layer)
    weight, count = dense_weight(layer), data.draw(st.sampled_from(geometry.slice_counts()))
    cost = CountedCost(geometry)
    with workers() as crew:
        found = ALDS("activation", shrinkage=shrinkage).candidates(weight, cost, crew, importance)
    candidates = [one for one in found.candidates if one.num_slices == count]
    if not candidates:
        return
    rank = data.draw(st.integers(1, candidates[0].last))
    made = built(layer, lrc.Factorization("kernel_in_encoder", count, rank, 0.0, 0, 1), importance, shrinkage)
    assert (importance.means is None) == (layer.bias is None)
    whole = lost(weight, varying(importance, shrinkage), 1)
    error = lost(weight - dense_weight(made), varying(importance, shrinkage), count)
    expected = candidates[0].errors[rank].item()
    if torch.isfinite(candidates[0].errors[rank]) and whole > 1e-9:
        assert error / whole == pytest.approx(expected, abs=RESOLUTION)


@law
@given(layers(), st.sampled_from(list(FOLDINGS)), st.data())
def test_kernel_axes_in_the_decoder_count_each_of_their_positions_by_itself(case, folding, data):
    """The measure of such a folding: what the layer that is built is off, the decoder's positions uncorrelated."""
    layer, inputs = case
    importance, geometry = collect_moments(nn.Sequential(layer), [inputs])["0"], layer_type(layer).geometry(layer)
    weight, groups = dense_weight(layer), geometry.groups
    with workers() as crew:
        found = ALDS("activation", foldings=(folding,)).candidates(weight, CountedCost(geometry), crew, importance)
    if not found.candidates:
        return
    one = data.draw(st.sampled_from(found.candidates))
    rank = data.draw(st.integers(1, one.last))
    made = built(layer, lrc.Factorization(one.folding, one.num_slices, rank, 0.0, 0, 1), importance)
    moments = Importance(varying(importance)).of_columns(geometry, one.folding)

    def folded(matrix):
        return fold(matrix, one.folding, 1, groups).reshape(-1, moments.shape[1])

    whole = lost(folded(weight), moments, 1)
    error = lost(folded(weight - dense_weight(made)), moments, one.num_slices)
    if torch.isfinite(one.errors[rank]) and whole > 1e-9:
        assert error / whole == pytest.approx(one.errors[rank].item(), abs=RESOLUTION)


@law
@given(layers())
def test_one_slice_errs_as_the_outputs_do(case):
    layer, inputs = case
    importance = collect_moments(nn.Sequential(layer), [inputs])["0"]
    geometry = layer_type(layer).geometry(layer)
    with workers() as crew:
        found = ALDS("activation", max_slices=1).candidates(
            dense_weight(layer), CountedCost(geometry), crew, importance
        )
    for candidate in found.candidates:
        made = built(layer, lrc.Factorization(candidate.folding, 1, 1, 0.0, 0, 1), importance)
        wanted, missing = layer(inputs), layer(inputs) - made(inputs)
        if layer.bias is not None:  # it makes up for what is constant
            axes = [axis for axis in range(inputs.dim()) if axis != 1]
            shift = importance.shift(dense_weight(layer) - dense_weight(made))
            assert torch.allclose(shift, missing.mean(axes), atol=1e-9)
            wanted, missing = (one - one.mean(axes, keepdim=True) for one in (wanted, missing))
        if wanted.norm() > 1e-9:
            off = (missing.norm() / wanted.norm()).item()
            assert off == pytest.approx(candidate.errors[1].item(), abs=RESOLUTION)


@law
@given(layers(), st.sampled_from(list(FOLDINGS)), st.data())
def test_full_rank_reproduces_the_dense_layer_whatever_was_seen(case, folding, data):
    layer, inputs = case
    importance = collect_moments(nn.Sequential(layer), [inputs])["0"]
    geometry = layer_type(layer).geometry(layer)
    count = data.draw(st.sampled_from(geometry.slice_counts()))
    choice = lrc.Factorization(folding, count, geometry.full_rank(folding, count), 0.0, 0, 1)
    made = built(layer, choice, importance)
    assert torch.allclose(dense_weight(made), dense_weight(layer), atol=1e-9)


@law
@given(layers(), st.sampled_from(list(FOLDINGS)), st.data())
def test_diagonals_and_channels_are_moments_with_nothing_beside_them(case, folding, data):
    layer, _ = case
    geometry = layer_type(layer).geometry(layer)
    channels, positions = geometry.in_channels // geometry.groups, dense_weight(layer)[0, 0].numel()
    form = data.draw(st.sampled_from(["diagonal", "channels", "diagonal of channels"]))
    if form == "diagonal":
        given_as = torch.rand(geometry.groups, channels * positions, dtype=torch.float64)
        full = torch.diag_embed(given_as)
    else:
        root = torch.randn(geometry.groups, channels, channels, dtype=torch.float64)
        given_as = root @ root.mT
        if form == "diagonal of channels":
            given_as = given_as.diagonal(dim1=1, dim2=2)
        square = torch.diag_embed(given_as) if given_as.dim() == 2 else given_as
        full = torch.stack([torch.kron(one, torch.eye(positions, dtype=torch.float64)) for one in square])
    count = data.draw(st.sampled_from(geometry.slice_counts()))
    choice = lrc.Factorization(folding, count, 1, 0.0, 0, 1)
    one, other = built(layer, choice, Importance(given_as)), built(layer, choice, Importance(full))
    errors = [
        lost_in(folding, dense_weight(layer) - dense_weight(made), full, geometry, count) for made in (one, other)
    ]
    assert errors[0] == pytest.approx(errors[1], abs=1e-7)


def lost_in(folding, residual, moments, geometry, count):
    columns = Importance(moments).of_columns(geometry, folding)
    matrix = fold(residual, folding, 1, geometry.groups)
    return lost(matrix.flatten(0, 1), columns, count)


@law
@given(layers(), st.data())
def test_weights_of_outputs_weigh_the_rows(case, data):
    layer, _ = case
    geometry = layer_type(layer).geometry(layer)
    outputs = torch.rand(geometry.out_channels, dtype=torch.float64) + 0.1
    count, importance = data.draw(st.sampled_from(geometry.slice_counts())), Importance(outputs=outputs)
    with workers() as crew:
        found = ALDS("fisher").candidates(dense_weight(layer), CountedCost(geometry), crew, importance)
    rows = outputs.sqrt()[:, None]
    whole = (rows * dense_weight(layer).flatten(1)).norm()
    for candidate in [one for one in found.candidates if one.num_slices == count]:
        choice = lrc.Factorization(candidate.folding, count, candidate.last, 0.0, 0, 1)
        residual = dense_weight(layer) - dense_weight(built(layer, choice, importance))
        error = ((rows * residual.flatten(1)).norm() / whole).item()
        if torch.isfinite(candidate.errors[-1]):
            assert error == pytest.approx(candidate.errors[-1].item(), abs=RESOLUTION)
