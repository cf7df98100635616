"""Projection: the momentum of a dense weight becomes that of its factors, by the chain rule."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.decisions.factorization import Factorization
from lr_callback.edits.build import skeleton
from lr_callback.edits.projection import can_project, check_optimizer_state, project_gradient, projected_state
from lr_callback.mathematics.folding import FOLDINGS

LINEAR, CONVOLUTION = nn.Linear(12, 10), nn.Conv2d(12, 10, (3, 2), stride=2, padding=1, padding_mode="reflect")
SHAPES = [
    *((LINEAR, (5, 12), "kernel_in_encoder", count) for count in (1, 3)),
    *((CONVOLUTION, (2, 12, 6, 5), folding, count) for folding in FOLDINGS for count in (1, 2, 4)),
]
IDS = [f"{type(layer).__name__}-{folding}-{count}" for layer, _, folding, count in SHAPES]
ADAMS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adam fused": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "adam foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adamw amsgrad fused": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, fused=True),
}
SGDS = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, foreach=False),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "foreach": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, foreach=True),
    "fused": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def factorized(layer, folding="kernel_in_encoder", count=1, rank=2, dtype=torch.float64):
    made = skeleton(copy.deepcopy(layer).to(dtype), Factorization(folding, count, rank, 0.0, 0, 0))
    for factor in made.factors:
        nn.init.normal_(factor)
    return made


def dense_gradient(made, inputs, target):
    """Return the gradient of a loss with respect to the product of the factors, from the dense layer."""
    dense = made.to_dense()
    (dense(inputs) - target).square().mean().backward()
    return dense.weight.grad


@pytest.mark.parametrize(("layer", "shape", "folding", "count"), SHAPES, ids=IDS)
def test_the_projection_of_the_gradient_is_the_gradient_of_the_factors(layer, shape, folding, count):
    made = factorized(layer, folding, count)
    inputs = torch.randn(shape, dtype=torch.float64)
    outputs = made(inputs)
    target = torch.randn_like(outputs)
    (outputs - target).square().mean().backward()
    found = project_gradient(dense_gradient(made, inputs, target), *made.factors, folding, count)
    for one, factor in zip(found, made.factors, strict=True):
        assert one.shape == factor.shape
        assert torch.allclose(one, factor.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape", "folding", "count"), SHAPES, ids=IDS)
def test_second_moments_are_those_of_uncorrelated_gradients(layer, shape, folding, count):
    """Of gradients with independent signs the mean of squares is the projected one, up to chance."""
    made = factorized(layer, folding, count)
    weight = made.to_dense().weight
    size = torch.rand_like(weight)
    optimizer = torch.optim.Adam([weight])
    state = {"step": torch.tensor(9.0), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": size.square()}
    found = projected_state(optimizer, state, made)
    draws = [size * torch.randn(weight.shape, dtype=torch.float64) for _ in range(1500)]
    seen = [project_gradient(draw, *made.factors, folding, count) for draw in draws]
    for index, factor in enumerate(made.factors):
        mean = torch.stack([one[index].square() for one in seen]).mean(0)
        assert torch.allclose(found[factor]["exp_avg_sq"], mean, rtol=0.25)


def stepped(make, dtype=torch.float64, channels_last=False):
    """Return an optimizer that has made three steps with a layer, the layer, and what stands in its place."""
    layer = copy.deepcopy(CONVOLUTION).to(dtype)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    optimizer = make(list(layer.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 12, 6, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return optimizer, layer, factorized(layer, "height_in_decoder", 2, dtype=dtype)


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_adam_means_are_exact_squares_are_bounded_and_steps_are_carried(make):
    optimizer, layer, made = stepped(make)
    state = optimizer.state[layer.weight]
    found = projected_state(optimizer, state, made)
    expected = project_gradient(state["exp_avg"], *made.factors, made.folding, made.num_slices)
    for factor, mean in zip(made.factors, expected, strict=True):
        own = found[factor]
        assert own.keys() == state.keys()
        assert torch.equal(own["exp_avg"], mean)
        assert own["step"] == 3 and own["step"] is not state["step"]
        assert (own["exp_avg_sq"] >= own["exp_avg"].square()).all()
        assert (own.get("max_exp_avg_sq", own["exp_avg_sq"]) >= own["exp_avg_sq"]).all()
        assert not own["exp_avg"].requires_grad
    first, second = (found[factor]["step"] for factor in made.factors)
    assert first is not second


@pytest.mark.parametrize("make", SGDS.values(), ids=SGDS)
def test_momentum_of_sgd_is_exact(make):
    optimizer, layer, made = stepped(make)
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    found = projected_state(optimizer, optimizer.state[layer.weight], made)
    expected = project_gradient(buffer, *made.factors, made.folding, made.num_slices)
    assert all(
        torch.equal(found[factor]["momentum_buffer"], mean) for factor, mean in zip(made.factors, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [ADAMS["adam fused"], SGDS["fused"]], ids=["adam", "sgd"])
def test_state_has_the_dtype_of_the_old_and_the_layout_of_the_factor(make, dtype):
    optimizer, layer, made = stepped(make, dtype, channels_last=True)
    found = projected_state(optimizer, optimizer.state[layer.weight], made)
    for factor in made.factors:
        for name, value in found[factor].items():
            if name != "step":
                assert (value.dtype, value.stride()) == (dtype, factor.stride())


class MoreThanAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    "make",
    [
        MoreThanAdam,
        lambda params: torch.optim.SGD(params, lr=0.01),
        lambda params: torch.optim.RMSprop(params, centered=True, momentum=0.9),
        torch.optim.Adadelta,
        torch.optim.NAdam,
        torch.optim.Adagrad,
    ],
    ids=["subclass", "sgd without momentum", "rmsprop", "adadelta", "nadam", "adagrad"],
)
def test_state_of_others_is_not_projected(make):
    optimizer, layer, made = stepped(make)
    assert projected_state(optimizer, optimizer.state.get(layer.weight, {}), made) == {}


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: without(state, "exp_avg"),
        lambda state: {**state, "mine": torch.zeros(1)},
        lambda state: {**state, "exp_avg_sq": state["exp_avg_sq"].flatten()},
        lambda state: {**state, "exp_avg": None},
    ],
    ids=["one is missing", "one is not known", "of another shape", "none"],
)
def test_a_state_is_projected_whole_or_not_at_all(change):
    optimizer, layer, made = stepped(ADAMS["adam"])
    assert projected_state(optimizer, change(optimizer.state[layer.weight]), made) == {}


@pytest.mark.parametrize("make", [*ADAMS.values(), *SGDS.values()], ids=[*ADAMS, *SGDS])
def test_factorize_projects_on_request_trains_on_and_can_be_saved(make):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    inputs, optimizer = torch.randn(4, 8, 4, 4), make(list(model.parameters()))

    def step():
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    step()
    optimizer.state.pop(model[4].weight)  # never had a gradient, say
    states = {name: dict(optimizer.state[model[int(name)].weight]) for name in "02"}
    report = lrc.factorize_(model, lrc.allocate(model, 0.4), optimizers=optimizer, optimizer_state="project")
    assert report.factorized == ("0", "2", "4")
    for name, state in states.items():
        made = model[int(name)]
        for which in state.keys() & {"exp_avg", "momentum_buffer"}:
            expected = project_gradient(state[which], *made.factors, made.folding, made.num_slices)
            for factor, mean in zip(made.factors, expected, strict=True):
                assert torch.equal(optimizer.state[factor][which], mean)
    for factor in model[4].factors:
        assert not any(value.any() for value in optimizer.state.get(factor, {}).values())
    for _ in range(3):
        step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step()
    assert all(one.isfinite().all() for one in model.parameters())


def test_what_was_factorized_before_starts_anew():
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for keep_ratio in (0.5, 0.25):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        lrc.factorize_(model, lrc.allocate(model, keep_ratio), optimizers=optimizer, optimizer_state="project")
        assert {factor in optimizer.state for factor in model[0].factors} == {keep_ratio == 0.5}


class Around(torch.optim.Optimizer):
    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups


def test_momentum_inside_a_wrapper_is_projected():
    states = []
    for wrap in (lambda one: one, Around, lambda one: Around(Around(one))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64))
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(2, 64)).square().mean().backward()
        inner.step()
        lrc.factorize_(model, lrc.allocate(model, 0.5), optimizers=wrap(inner), optimizer_state="project")
        states.append([inner.state[factor]["momentum_buffer"] for factor in model[0].factors])
    assert all(torch.equal(*pair) for other in states[1:] for pair in zip(states[0], other, strict=True))
    assert states[0][0].any()


def test_projected_and_reset_states_are_the_same_in_a_group_without_state():
    for optimizer_state in ("reset", "project"):
        model = nn.Sequential(nn.Linear(64, 64))
        optimizer = torch.optim.Adam(model.parameters())
        lrc.factorize_(model, lrc.allocate(model, 0.5), optimizers=optimizer, optimizer_state=optimizer_state)
        assert not optimizer.state


@pytest.mark.parametrize("word", ["carry", "", None])
def test_another_word_is_refused_before_anything_is_done(word):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"`optimizer_state` must be one of \['reset', 'project'\], got"):
        lrc.factorize_(model, lrc.allocate(model, 0.5), optimizer_state=word)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="`optimizer_state` must be one of"):
        lrc.LowRankCompression(optimizer_state=word)
    with pytest.raises(ValueError, match="`optimizer_state` must be one of"):
        check_optimizer_state(word)


def test_only_sgd_and_adam_themselves_can_be_projected():
    weight = [nn.Parameter(torch.zeros(2, 2))]
    kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, MoreThanAdam)
    assert [can_project(kind(weight, lr=0.1)) for kind in kinds] == [True, True, True, False, False]
