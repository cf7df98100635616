"""Convolutions: memory formats, foldings by axis, output sizes of transposed ones, and depthwise ones."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.decisions.costs import CountedCost
from lr_callback.mathematics.folding import FOLDINGS

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DEPTHWISE = "a depthwise convolution: no rank costs less than the dense layer"


def filled(layer):
    """Return a factorized layer with weights drawn."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("folding", list(FOLDINGS))
@pytest.mark.parametrize("kind", TRANSPOSED, ids=lambda kind: kind.__name__)
def test_the_output_size_of_a_transposed_convolution_may_be_asked_for(kind, folding):
    axes = TRANSPOSED.index(kind) + 1
    dense = kind(4, 6, 3, stride=3, padding=1, groups=2)
    layer = filled(getattr(lrc, f"Factorized{kind.__name__}")(dense, 2, 1, folding))
    inputs = torch.randn(2, 4, *[5, 4, 3][:axes])
    sizes = [[14, 12, 9][:axes], [13, 10, 7][:axes]]
    for wanted in (*sizes, torch.Size([2, 6, *sizes[0]])):
        outputs = layer(inputs, output_size=wanted)
        assert outputs.shape == (2, 6, *wanted[-axes:])
        assert torch.allclose(outputs, layer.to_dense()(inputs, wanted), atol=1e-4)
    with pytest.raises(ValueError, match=r"requested an output size of .*, but valid sizes range from"):
        layer(inputs, [99] * axes)
    with pytest.raises(ValueError, match=rf"output_size must have {axes} or {axes + 2} elements"):
        layer(inputs, [9] * (axes - 1))


@pytest.mark.parametrize("rank", [1, 2])
def test_slices_of_one_channel_are_a_depthwise_encoder(rank):
    """What libraries have kernels of their own for: as many groups as channels."""
    layer = lrc.FactorizedConv2d(nn.Conv2d(8, 16, 3, padding=1), num_slices=8, rank=rank)
    encoder = layer.encoder
    assert (encoder.groups, encoder.in_channels, encoder.out_channels) == (8, 8, 8 * rank)
    assert layer.decoder.kernel_size == (1, 1)


@pytest.mark.parametrize("folding", ["kernel_in_encoder", "height_in_decoder", "kernel_in_decoder"])
@pytest.mark.parametrize(
    ("layer", "last"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), torch.channels_last),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.channels_last),
        (nn.Conv3d(4, 6, 3), torch.channels_last_3d),
        (nn.ConvTranspose3d(4, 6, 3), torch.channels_last_3d),
    ],
    ids=lambda value: type(value).__name__,
)
def test_channels_that_are_last_in_memory_stay_last(layer, last, folding):
    layer = layer.to(memory_format=last)
    made = type(layer).__name__
    factorized = getattr(lrc, f"Factorized{made}")(layer, 2, 2, folding)
    assert all(factor.is_contiguous(memory_format=last) for factor in factorized.factors)
    assert factorized.dense_skeleton().weight.stride() == layer.weight.stride()
    plain = getattr(lrc, f"Factorized{made}")(layer.to(memory_format=torch.contiguous_format), 2, 2, folding)
    assert all(factor.is_contiguous() for factor in plain.factors)


@pytest.mark.parametrize(
    ("layer", "distinct"),
    [
        (nn.Conv1d(4, 4, 3), ("kernel_in_encoder", "width_in_decoder")),
        (nn.Conv2d(4, 4, 3), ("kernel_in_encoder", "height_in_decoder", "width_in_decoder", "kernel_in_decoder")),
        (nn.Conv3d(4, 4, 3), tuple(FOLDINGS)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_folding_that_the_kernel_has_no_axis_for_is_not_tried(layer, distinct):
    kind = getattr(lrc, f"Factorized{type(layer).__name__}")
    assert CountedCost(kind.geometry(layer)).distinct_foldings(FOLDINGS) == distinct


def test_a_depthwise_convolution_is_left_out_unless_a_folding_makes_it_separable():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.Conv2d(16, 64, 1))
    assert lrc.allocate(model, 0.9).skipped == {"0": DEPTHWISE}
    method = lrc.ALDS(foldings=["kernel_in_encoder", "height_in_decoder"])
    chosen = lrc.allocate(model, 0.6, method=method).layers["0"]
    assert (chosen.folding, chosen.num_slices, chosen.rank) == ("height_in_decoder", 1, 1)
    assert (chosen.cost, chosen.dense_cost) == (6 * 16, 9 * 16)


def test_a_model_of_nothing_else_says_so():
    with pytest.raises(ValueError, match=rf"Nothing to factorize: .* Skipped: 0: {DEPTHWISE}"):
        lrc.allocate(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), 0.5)


def test_groups_of_several_outputs_a_channel_are_factorized_as_any():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=8, bias=False))
    chosen = lrc.allocate(model, 0.5).layers["0"]
    assert (chosen.num_slices, chosen.rank, chosen.cost) == (1, 1, 8 * (9 + 4))


def test_slices_that_a_group_cannot_be_cut_into_are_refused():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    allocation = lrc.Allocation(
        {"0": lrc.Factorization("kernel_in_encoder", 8, 1, 0, 0, 1)}, {}, {"0": (8, 4, 3, 3)}, 0, 1, 0, 1.0
    )
    wanted = r"0: `num_slices` must divide the 4 input channels of each group, got 8\. Nothing"
    with pytest.raises(ValueError, match=wanted):
        lrc.factorize_(model, allocation)


def test_factors_of_other_groups_are_refused_with_both_shapes():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2))
    other = nn.Sequential(nn.ConvTranspose2d(8, 8, 3))
    lrc.factorize_(other, lrc.allocate(other, 0.5))
    with pytest.raises(ValueError, match=r"0: the factors .* must multiply to a weight of shape \(8, 4, 3, 3\), found"):
        lrc.restore_(model, other.state_dict())
    assert type(model[0]) is nn.ConvTranspose2d


@pytest.mark.parametrize("folding", ["kernel_in_encoder", "width_in_decoder", "kernel_in_decoder"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose2d], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning")
def test_factorized_convolutions_are_scripted(kind, folding):
    dense = kind(4, 6, 3, stride=2, groups=2)
    layer = filled(getattr(lrc, f"Factorized{kind.__name__}")(dense, 2, 1, folding))
    inputs, scripted = torch.randn(2, 4, *[7] * layer.axes), torch.jit.script(layer)
    assert torch.equal(scripted(inputs), layer(inputs))
    if layer.transposed:
        assert torch.equal(scripted(inputs, [16, 15]), layer(inputs, [16, 15]))


@pytest.mark.parametrize(
    ("kind", "folding"), [(nn.Conv2d, "kernel_in_encoder"), (nn.ConvTranspose2d, "height_in_decoder")]
)
def test_a_kernel_of_1_along_a_stride_goes_where_it_costs_least(kind, folding):
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(kind(24, 24, (1, 3), stride=(4, 1))) for _ in range(2))
    inputs = torch.randn(1, 24, 8, 8)
    method = lrc.ALDS(max_slices=1, foldings=["kernel_in_encoder", "height_in_decoder"])
    for unit in ({"cost": "multiply_adds", "example_input": inputs}, {}):
        allocation = lrc.allocate(model, 0.5, method=method, **unit)
        assert allocation.layers["0"].folding == folding
    lrc.factorize_(model, allocation)
    lrc.restore_(fresh, model.state_dict())
    assert repr(fresh) == repr(model)
    assert torch.equal(fresh(inputs), model(inputs))
