"""Fisher: squared gradients as they are, from batches or from optimizers, with the model as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lr_callback as lrc
from lr_callback.calibration.fisher import fisher_importance
from lr_callback.layers.layer_types import dense_weight
from tests.unit.common.test_processes import on_ranks


def network(groups=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, groups=groups),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(),
        nn.ConvTranspose2d(16, 8, 2, groups=groups),
        nn.Flatten(),
        nn.Linear(200, 10),
    )


def batch(seed=0, count=12):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 4, 4, generator=draw), torch.randint(0, 10, (count,), generator=draw)


def loss(model, one):
    return F.cross_entropy(model(one[0]), one[1])


def squares(model, layer, batches):
    """Return mean squared gradients in the order of the dense weight, the slow way, by finite steps of autograd."""
    total = 0
    for one in batches:
        model.zero_grad()
        loss(model.eval(), one).backward()
        total = total + layer.weight.grad.double().square() / len(batches)
        model.zero_grad()
    return total


def matrices(layer, squared):
    """Return what is shaped as a layer's weight as a matrix of each group."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        squared = squared.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return squared.unflatten(0, (groups, -1)).flatten(2)


def is_product_of_sums(found, wanted):
    product = found.outputs.reshape(len(wanted), -1, 1) * found.inputs[:, None]
    sums = wanted.sum(2, keepdim=True) * wanted.sum(1, keepdim=True) / wanted.sum((1, 2), keepdim=True)
    return torch.allclose(product / product.sum(), sums / sums.sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_are_the_sums_of_rows_and_columns_of_squared_gradients(groups):
    model, batches = network(groups), [batch(seed) for seed in range(3)]
    wanted = {name: matrices(model[int(name)], squares(model, model[int(name)], batches)) for name in "046"}
    found = fisher_importance(model, batches, loss)
    assert set(found) == {"0", "4", "6"}
    assert all(is_product_of_sums(found[name], wanted[name]) for name in found)


def test_the_model_and_the_random_numbers_stay_as_they_were():
    model = network().train()
    model[0].requires_grad_(False)
    model[6].bias.grad = torch.ones(10)
    lrc.factorize_(model, lrc.allocate(model, 0.6, include="6"))
    layers, before = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fisher_importance(model, [batch()], loss)
    assert set(found) == {"0", "4", "6"}, "frozen layers, too: they may be cut"
    assert list(model.modules()) == layers and all(one.training for one in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model[0].weight.requires_grad and model[4].weight.grad is None
    assert torch.equal(model[6].bias.grad, torch.ones(10))


def test_a_factorized_layer_counts_as_the_dense_one_that_it_stands_for():
    model = network().double()
    lrc.factorize_(model, lrc.allocate(model, 0.6))
    one = (batch()[0].double(), batch()[1])
    found = fisher_importance(model, [one], loss)
    lrc.densify_(model)
    wanted = fisher_importance(model, [one], loss)
    for name, known in wanted.items():
        assert torch.allclose(found[name].inputs, known.inputs) and torch.allclose(found[name].outputs, known.outputs)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_have_them_in_their_state(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0)
    loss(model.eval(), batch()).backward()
    optimizer.step()
    found = fisher_importance(model, optimizers=optimizer)
    wanted = fisher_importance(model, [batch()], loss)
    assert set(found) == set(wanted)
    for name, known in wanted.items():
        scale = known.outputs.sum() / found[name].outputs.sum()
        assert torch.allclose(scale * found[name].outputs, known.outputs, rtol=1e-4)
        assert torch.allclose(found[name].inputs, known.inputs, rtol=1e-4)


@pytest.mark.parametrize("folding", ["kernel_in_encoder", "width_in_decoder"])
@pytest.mark.parametrize("slices", [1, 2])
def test_of_factors_the_rows_and_columns_of_a_gradient_of_rank_one_are_right(folding, slices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2, bias=False)).double()
    rows, columns = torch.rand(2, 6, 1).double(), torch.rand(2, 1, 4, 1, 1).double()
    choice = lrc.Factorization(folding, slices, 2, 0.0, 0, 1)
    allocation = lrc.Allocation({"0": choice}, {}, {"0": (12, 4, 3, 3)}, 0, 1, 0, 1.0)
    lrc.factorize_(model, allocation)
    gradient = (rows[..., None, None] * columns).expand(2, 6, 4, 3, 3).reshape(12, 4, 3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0)
    (model[0].ordered_weight * gradient).sum().backward()
    optimizer.step()
    found = fisher_importance(model, optimizers=optimizer)["0"]
    # Of columns each slice for itself.
    for parts, sums, wanted in ((2, found.outputs, rows**2), (2 * slices, found.inputs, columns**2)):
        both = [one.reshape(parts, -1) for one in (sums, wanted)]
        assert torch.allclose(*(one / one.sum(1, keepdim=True) for one in both))


@pytest.mark.parametrize("slices", [1, 2])
def test_the_error_is_that_of_what_is_built_for_weights_that_are_products(slices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 10, 3, bias=False))
    known = fisher_importance(model, [torch.randn(4, 6, 5, 5)], lambda model, one: model(one).square().sum())
    whole = dense_weight(model[0]).clone()
    method = lrc.ALDS("fisher", max_slices=slices)
    allocation = lrc.allocate(model, 0.5, method=method, importance=known)
    lrc.factorize_(model, allocation, importance=known)
    weights = known["0"].outputs[:, None] * known["0"].inputs
    off = (weights * (whole - dense_weight(model[0])).flatten(1).double().square()).sum().sqrt()
    error = (off / (weights * whole.flatten(1).double().square()).sum().sqrt()).item()
    assert allocation.layers["0"].relative_error == pytest.approx(error, rel=1e-5)


def test_no_other_factors_of_that_rank_have_a_smaller_error_for_such_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, bias=False)).double()
    data = torch.randn(30, 12).double() * torch.linspace(0.1, 3, 12)
    known = fisher_importance(model, [data], lambda model, one: model(one)[:, :5].pow(3).sum())["0"]
    whole, weights = model[0].weight.detach().clone(), known.outputs[:, None] * known.inputs

    def lost(weight):
        return (weights * (whole - weight).square()).sum()

    lrc.factorize_(
        model,
        lrc.Allocation(
            {"0": lrc.Factorization("kernel_in_encoder", 1, 3, 0.0, 0, 1)},
            {},
            {"0": (9, 12)},
            0,
            1,
            0,
            1.0,
            error="fisher",
        ),
        importance={"0": known},
    )
    best = lost(model[0].weight.detach())
    for _ in range(20):
        moved = [factor + 1e-2 * torch.randn_like(factor) for factor in model[0].factors]
        assert lost(moved[1] @ moved[0]) >= best


def test_several_processes_measure_as_one_with_all_batches(tmp_path):
    batches = [batch(seed) for seed in range(3)]

    def work(processes):
        own = batches[:2] if processes.rank == 0 else batches[2:]
        return {
            name: one.outputs.tolist()
            for name, one in fisher_importance(network(), own, loss, processes=processes).items()
        }

    found = on_ranks(2, tmp_path, work)
    whole = fisher_importance(network(), batches, loss)
    assert found[0] == found[1]
    assert found[0] == {name: pytest.approx(one.outputs.tolist(), rel=1e-9) for name, one in whole.items()}


def test_layers_without_a_gradient_have_none_and_dicts_of_sparse_gradients_do():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head, self.spare = nn.Embedding(50, 20, sparse=True), nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, words):
            return self.head(self.table(words))

    model = Bag()
    words = torch.tensor([[1, 2], [1, 3]])
    found = fisher_importance(model, [words], lambda model, one: model(one).square().sum())
    assert set(found) == {"table", "head"}
    assert torch.nonzero(found["table"].inputs[0]).flatten().tolist() == [1, 2, 3]


def test_bad_input_is_refused():
    model, adam = network(), torch.optim.Adam(network().parameters())
    for options in (
        {},
        {"batches": [batch()]},
        {"loss": loss},
        {"batches": [batch()], "loss": loss, "optimizers": adam},
    ):
        with pytest.raises(
            ValueError, match=r"takes either `batches` and a `loss\(model, batch\)`, or the `optimizers`"
        ):
            fisher_importance(model, **options)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        fisher_importance(model, [], loss)
    with pytest.raises(
        ValueError, match=r"must return a scalar tensor with a gradient, got a tensor of shape \(12, 10\)"
    ):
        fisher_importance(model, [batch()], lambda model, one: model(one[0]))
    with pytest.raises(ValueError, match="must return a scalar tensor with a gradient, got float"):
        fisher_importance(model, [batch()], lambda model, one: loss(model, one).item())
    with pytest.raises(ValueError, match=r"no layer has a gradient: the loss does not depend on them"):
        fisher_importance(model, [batch()], lambda model, one: 0 * loss(model, one))
    with pytest.raises(ValueError, match=r"0: its gradients cannot weigh it. `importance.inputs` must be finite"):
        fisher_importance(model, [batch()], lambda model, one: torch.nan * loss(model, one))
    assert all(one.requires_grad for one in model.parameters()) and model.training


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_optimizers_that_have_none_are_refused(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    if kind is torch.optim.SGD:
        loss(model, batch()).backward()
        optimizer.step()
    with pytest.raises(ValueError, match=rf"no layer has mean squared .*\({kind.__name__}\): Adam, AdamW and RMSprop"):
        fisher_importance(model, optimizers=[optimizer])
