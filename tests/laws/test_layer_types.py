"""Laws 1, 2 and 9 for every layer type and setting: what is built is the dense layer, errs and costs as reported."""

import copy
from dataclasses import dataclass, replace
from math import sqrt

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lr_callback as lrc
from lr_callback.common.parallel import workers
from lr_callback.layers.layer_types import dense_weight, layer_cost, layer_type
from lr_callback.mathematics.errors import ERRORS, relative_errors
from lr_callback.mathematics.folding import FOLDINGS, fold

TOLERANCE = 1e-10
RESOLUTION = 1e-6  # a root of an eigenvalue in float64 resolves about 1e-7 of the largest
PLAIN, TRANSPOSED = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Case:
    """A dense layer, an input for it, and a structure that it can have."""

    layer: nn.Module
    inputs: torch.Tensor
    folding: str
    num_slices: int
    rank: int

    @property
    def geometry(self):
        return layer_type(self.layer).geometry(self.layer)

    def built(self, rank=None):
        """Return a model of one layer, named 0, in the structure."""
        model = nn.Sequential(copy.deepcopy(self.layer))
        choice = lrc.Factorization(self.folding, self.num_slices, rank or self.rank, 0.0, 0, 1)
        lrc.factorize_(model, lrc.Allocation({"0": choice}, {}, {"0": self.geometry.weight_shape}, 0, 1, 0, 1.0))
        return model


def convolution(draw, kind):
    """Draw a convolution of any configuration."""
    axes = (PLAIN + TRANSPOSED).index(kind) % 3 + 1

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    options = {"dilation": each(1, 2), "stride": each(1, 3), "padding": each(0, 2), "groups": groups}
    if kind in TRANSPOSED:
        both = zip(options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in both)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        options["padding"] = draw(st.sampled_from([options["padding"], options["padding"], "same", "valid"]))
        options["stride"] = 1 if options["padding"] == "same" else options["stride"]
    channels = groups * draw(st.sampled_from([1, 2, 4])), groups * draw(st.integers(1, 3))
    layer = kind(*channels, each(1, 3), bias=draw(st.booleans()), dtype=torch.float64, **options)
    return layer, torch.randn(*draw(st.sampled_from([(), (2,)])), channels[0], *each(5, 6), dtype=torch.float64)


@st.composite
def cases(draw):
    """Draw a layer of any type."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from([*PLAIN, *TRANSPOSED, nn.Linear, nn.Embedding, Conv1D]))
    if kind in PLAIN + TRANSPOSED:
        layer, inputs = convolution(draw, kind)
    else:
        sizes = draw(st.sampled_from([1, 4, 6, 12])), draw(st.integers(1, 9))
        leading = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        inputs = torch.randn(*leading, sizes[0], dtype=torch.float64)
        if kind is nn.Embedding:
            inputs = torch.randint(sizes[0], leading)
            layer = kind(*sizes, padding_idx=draw(st.sampled_from([None, 0, -1])) if sizes[0] > 1 else None)
        else:
            layer = kind(sizes[1], sizes[0]) if kind is Conv1D else kind(*sizes, bias=draw(st.booleans()))
        layer = layer.double()
    geometry, folding = layer_type(layer).geometry(layer), draw(st.sampled_from(list(FOLDINGS)))
    num_slices = draw(st.sampled_from(geometry.slice_counts()))
    return Case(layer, inputs, folding, num_slices, draw(st.integers(1, geometry.full_rank(folding, num_slices))))


def near(found, wanted):
    distance, scale = (float(one.detach().norm()) for one in (found - wanted, wanted))
    return found.shape == wanted.shape and distance <= TOLERANCE * (1 + scale)


@law
@given(cases())
def test_at_full_rank_any_layer_is_the_dense_one_and_densify_undoes_it(case):
    model = case.built(case.geometry.full_rank(case.folding, case.num_slices))
    wanted = case.layer(case.inputs)
    assert near(model(case.inputs), wanted)
    assert near(model[0].weight, case.layer.weight)
    lrc.densify_(model)
    assert type(model[0]) is type(case.layer)
    assert repr(model[0]) == repr(case.layer)
    assert near(model(case.inputs), wanted)


@law
@given(cases())
def test_at_any_rank_a_layer_does_what_the_dense_one_with_its_weight_does(case):
    model = case.built()
    assert (model[0].rank, model[0].num_slices) == (case.rank, case.num_slices)
    dense = model[0].to_dense()
    assert torch.equal(dense.weight, model[0].weight)
    assert near(model(case.inputs), dense(case.inputs))


@law
@given(cases(), st.sampled_from(list(ERRORS)))
def test_the_error_is_that_of_the_weight_of_the_layer_that_is_built(case, error):
    with workers() as crew:
        folded = fold(dense_weight(case.layer), case.folding, 1, case.geometry.groups)
        curve = relative_errors(folded, error, {case.num_slices: case.rank}, crew)[case.num_slices]
    whole, left = (matrices(case, weight) for weight in (case.layer.weight, case.layer.weight - case.built()[0].weight))
    order = "fro" if error == "frobenius" else 2
    norm = torch.linalg.matrix_norm(torch.block_diag(*whole), order)
    if error in {"slice", "bound"}:
        lost = max(torch.linalg.matrix_norm(part, 2) for group in left for part in group.chunk(case.num_slices, 1))
        lost = lost * (sqrt(case.num_slices) if error == "bound" else 1)
    else:
        lost = torch.linalg.matrix_norm(torch.block_diag(*left), order)
    assert abs(float(lost / norm) - float(curve[case.rank])) <= RESOLUTION


def matrices(case, weight):
    """Return the matrix of each group of a weight in torch's own layout."""
    weight, axes = weight.detach(), len(case.geometry.kernel)
    swapped = type(case.layer) not in {*PLAIN, nn.Linear}
    parts = [group.transpose(0, 1) if swapped else group for group in weight.chunk(case.geometry.groups)]
    own = [axis for axis in range(axes) if axis - axes in FOLDINGS[case.folding]]
    other = [axis for axis in range(axes) if axis not in own]
    order = [0, *(2 + axis for axis in own), 1, *(2 + axis for axis in other)]
    return [part.permute(order).flatten(0, len(own)).flatten(1) for part in parts]


@law
@given(cases())
def test_the_cost_is_that_of_the_layer_that_is_built(case):
    model, kind = case.built(), layer_type(case.layer)
    structure = (case.folding, case.num_slices, case.rank)
    call = kind.call(case.inputs, case.layer(case.inputs))
    parameters, products = layer_cost(case.layer), layer_cost(case.layer, (call,))
    assert parameters.dense == numbers(case.layer)
    assert parameters.factorized(*structure) == numbers(model)
    assert products.dense == counted(case.layer, case.inputs)
    assert products.factorized(*structure) == counted(model, case.inputs)


@law
@given(cases(), st.sampled_from(list(FOLDINGS)))
def test_of_foldings_with_the_same_matrices_the_cheapest_is_tried(case, other):
    cost = layer_cost(case.layer, (layer_type(case.layer).call(case.inputs, case.layer(case.inputs)),))
    choices = [name for name in FOLDINGS if case.geometry.decoder_kernel(name) == case.geometry.decoder_kernel(other)]
    [tried] = set(cost.distinct_foldings(FOLDINGS)) & set(choices)
    built = [replace(case, folding=name, rank=1, num_slices=1).built() for name in (tried, other)]
    assert counted(built[0], case.inputs) <= counted(built[1], case.inputs)
    assert numbers(built[0]) == numbers(built[1])
    assert near(built[0](case.inputs), built[1](case.inputs))


def numbers(module):
    return sum(one.numel() for one in module.parameters())


def counted(module, inputs):
    """Return the multiply-adds that torch counts in one call."""
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() / 2


@law
@given(cases())
def test_the_structure_is_read_off_a_state_dict_and_back_to_dense(case):
    model, dense = case.built(), nn.Sequential(copy.deepcopy(case.layer))
    fresh = copy.deepcopy(dense)
    lrc.restore_(fresh, model.state_dict())
    assert (fresh[0].num_slices, fresh[0].rank) == (case.num_slices, case.rank)
    assert torch.equal(fresh(case.inputs), model(case.inputs))
    lrc.restore_(fresh, dense.state_dict())
    assert torch.equal(fresh(case.inputs), dense(case.inputs))


@law
@given(cases())
def test_building_any_layer_draws_no_random_numbers_and_keeps_what_code_reads(case):
    before = torch.get_rng_state()
    layer = case.built()[0]
    layer.dense_skeleton()
    assert torch.equal(torch.get_rng_state(), before)
    public = {name for name in vars(case.layer) if not name.startswith("_")} - {"training"}
    assert {name: getattr(layer, name) for name in public} == {name: getattr(case.layer, name) for name in public}
    assert layer.weight.shape == case.layer.weight.shape


@law
@given(cases(), st.sampled_from(["sgd", "adam"]))
def test_the_gradient_of_factors_is_what_projects_on_them(case, name):
    model, layer = nn.Sequential(copy.deepcopy(case.layer)), case.built()[0]
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name](
        model.parameters(), lr=1e-3, **({"momentum": 0.9} if name == "sgd" else {})
    )
    model(case.inputs).square().sum().backward()
    optimizer.step()
    key = "momentum_buffer" if name == "sgd" else "exp_avg"
    momentum = optimizer.state[model[0].weight][key].clone()
    choice = lrc.Factorization(layer.folding, layer.num_slices, layer.rank, 0.0, 0, 1)
    allocation = lrc.Allocation({"0": choice}, {}, {"0": case.geometry.weight_shape}, 0, 1, 0, 1.0)
    lrc.factorize_(model, allocation, optimizers=optimizer, optimizer_state="project")
    wanted = torch.autograd.grad((model[0].weight * momentum).sum(), model[0].factors)
    for factor, gradient in zip(model[0].factors, wanted, strict=True):
        assert near(optimizer.state[factor][key], gradient)


@law
@given(cases(), st.booleans())
def test_patches_times_the_weight_are_the_outputs(case, some):
    kind, layer = layer_type(case.layer), case.layer
    outputs = layer(case.inputs).detach()
    wanted = kind.results(layer, outputs)
    chosen = torch.arange(0, wanted.shape[1], 2) if some else None
    patches = kind.patches(layer, case.inputs, outputs, chosen)
    if not kind.has_patches:
        assert patches is None
        return
    groups = case.geometry.groups
    weight = dense_weight(layer).reshape(groups, -1, patches.shape[2])
    bias = getattr(layer, "bias", None)
    found = patches @ weight.mT + (0 if bias is None else bias.detach().reshape(groups, 1, -1))
    assert torch.allclose(found, wanted if chosen is None else wanted[:, chosen], atol=TOLERANCE)
