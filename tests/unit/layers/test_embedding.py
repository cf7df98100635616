"""Embeddings: an option that is off; rows of padding, sparse gradients, costs."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.model.observe import observe

OFF = "an embedding; set `embeddings=True` to factorize it"


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(60, 16, **options), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def factorized(model, keep_ratio=0.4):
    lrc.factorize_(model, lrc.allocate(model, keep_ratio, embeddings=True))
    assert type(model[0]) is lrc.FactorizedEmbedding
    return model


def test_an_embedding_is_left_out_unless_it_is_asked_for():
    assert lrc.allocate(network(), 0.9).skipped == {"0": OFF}
    allocation = lrc.allocate(network(), 0.4, embeddings=True)
    assert allocation.skipped == {}
    assert allocation.shapes["0"] == (16, 60)
    assert allocation.layers["0"].num_slices == 1


def test_one_that_is_not_asked_for_again_becomes_dense():
    model = factorized(network())
    lrc.factorize_(model, lrc.allocate(model, 0.9))
    assert type(model[0]) is nn.Embedding


def test_it_gives_the_rows_of_its_weight():
    layer = factorized(network())[0]
    indices = torch.tensor([[3, 59], [0, 3]])
    assert layer.weight.shape == (60, 16)
    assert torch.allclose(layer(indices), layer.weight[indices], atol=1e-6)
    assert torch.allclose(layer.to_dense()(indices), layer(indices), atol=1e-6)


@pytest.mark.parametrize("padding", [0, 7, -1])
@pytest.mark.parametrize(
    "optimize", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, 0.9)], ids=["adam", "sgd"]
)
def test_the_row_of_padding_stays_zero_and_gets_no_gradient(padding, optimize):
    model = factorized(network(padding_idx=padding))
    optimizer = optimize(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(60)).square().sum().backward()
        assert not model[0].encoder.weight.grad[padding].any()
        optimizer.step()
    assert not model[0](torch.tensor([padding % 60])).any()
    assert not model[0].weight[padding].any()
    lrc.densify_(model)
    assert not model[0].weight[padding].any()
    assert model[0].padding_idx == padding % 60


@pytest.mark.parametrize("setting", ["sparse", "scale_grad_by_freq"])
def test_settings_of_the_gradient_are_taken_over(setting):
    model = factorized(network(**{setting: True}))
    model(torch.tensor([1, 1, 2])).sum().backward()
    assert model[0].encoder.weight.grad.is_sparse == (setting == "sparse")
    for layer in (model[0], model[0].encoder, model[0].to_dense()):
        assert getattr(layer, setting)


def test_momentum_of_sparse_gradients_is_not_projected():
    model = nn.Sequential(nn.Embedding(60, 16, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.tensor([1, 1, 2])).sum().backward()
    optimizer.step()
    allocation = lrc.allocate(model, 0.5, embeddings=True)
    lrc.factorize_(model, allocation, optimizers=optimizer, optimizer_state="project")
    assert not optimizer.state


def test_sparse_adam_does_not_take_the_decoder_and_all_stays():
    model = nn.Sequential(nn.Embedding(60, 16, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    layer, allocation = model[0], lrc.allocate(model, 0.5, embeddings=True)
    with pytest.raises(RuntimeError, match=r"must have sparse gradients, 0\.decoder\.weight would not\. Nothing was"):
        lrc.factorize_(model, allocation, optimizers=optimizer)
    assert model[0] is layer
    assert optimizer.param_groups[0]["params"][0] is layer.weight


def test_a_lookup_multiplies_nothing_and_so_no_rank_is_cheaper():
    model, indices = network(), torch.zeros(5, dtype=torch.long)
    dense = observe(model, indices).dense_multiply_adds
    assert dense == 5 * (16 * 16 + 16 * 4)
    counted = lrc.allocate(model, 0.9, cost="multiply_adds", example_input=indices, embeddings=True)
    assert counted.skipped == {"0": "too small: no rank costs less than the dense layer"}
    assert observe(factorized(model), indices).dense_multiply_adds == dense


def test_its_structure_is_read_from_a_file_without_being_asked_for():
    model, fresh = factorized(network()), network()
    lrc.restore_(fresh, model.state_dict())
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_one_whose_weight_is_the_heads_is_left_out():
    model = network()
    model.head = nn.Linear(16, 60, bias=False)
    model.head.weight = model[0].weight
    assert lrc.allocate(model, 0.9, embeddings=True).skipped["0"] == "its weight is tied to that of head"


def test_slices_of_an_embedding_are_refused():
    choice = lrc.Factorization("kernel_in_encoder", 2, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="0: `num_slices` must be 1, got 2"):
        lrc.factorize_(network(), lrc.Allocation({"0": choice}, {}, {"0": (16, 60)}, 0, 1, 0, 1.0))
