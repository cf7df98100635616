"""Wrappers, optimizers of other packages and of torch.distributed: they follow, or the run says that they do not."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import distributed
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import SGD, Adadelta, Adam, Optimizer, RMSprop, lr_scheduler

import lr_callback as lrc
from lr_callback import LowRankCompression
from lr_callback.edits.optimizers import with_inner

pytestmark = pytest.mark.usefixtures("one_thread")


def compression(**options):
    return LowRankCompression(0.5, 1, show_table=False, **options)


class Lookahead(Optimizer):
    """Shares groups with the optimizer inside and keeps slow weights in a state of its own."""

    def __init__(self, inner, every=2):
        self.inner, self.every, self.calls = inner, every, 0
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.calls += 1
        for one in (one for group in self.param_groups for one in group["params"]):
            slow = self.state[one].setdefault("slow", one.detach().clone())
            if self.calls % self.every == 0:
                one.data.copy_(slow.lerp_(one.detach(), 0.5))
        return loss


class GroupsOfItsOwn(Optimizer):
    """Has groups of its own, whose gradients it clears, around an optimizer that steps."""

    def __init__(self, optimizer):
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self.optimizer = optimizer

    def step(self, closure=None):
        for own, inside in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inside["lr"] = own["lr"]
        return self.optimizer.step(closure)


class Several(Optimizer):
    """Holds its optimizers in a list, and shows the groups of all."""

    def __init__(self, *optimizers):
        self.parts = list(optimizers)
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def step(self, closure=None):
        loss = closure()
        for one in self.parts:
            one.step()
        return loss


def several(module):
    early, late = list(module.network[:6].parameters()), list(module.network[6:].parameters())
    return Several(Adam(early, lr=0.005), SGD(late, lr=0.05, momentum=0.9, fused=True))


WRAPPERS = {
    "sharing the groups of the one inside": lambda m: Lookahead(SGD(m.parameters(), lr=0.05, momentum=0.9)),
    "groups of its own": lambda m: GroupsOfItsOwn(Adam(m.parameters(), lr=0.005)),
    "several inside": several,
    "a wrapper in a wrapper": lambda m: Lookahead(GroupsOfItsOwn(SGD(m.parameters(), lr=0.05, momentum=0.9))),
}


class AtCut(Callback):
    """Note the weights right after the cut."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 0):
            self.weights = {name: one.detach().clone() for name, one in pl_module.named_parameters()}


def still(module, at_cut):
    """Return the names of factors that have not moved since the cut."""
    factors = [name for name in at_cut.weights if "coder.weight" in name]
    assert len(factors) >= 2
    return [name for name in factors if torch.equal(module.get_parameter(name), at_cut.weights[name])]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.situation("Optimizers", f"wrapper: {name}", "works")) for name in WRAPPERS],
)
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_every_optimizer_in_a_wrapper_follows_and_the_factors_train(name, optimizer_state, fit, new_module):
    module, at_cut = new_module(WRAPPERS[name]), AtCut()
    trainer = fit(module, compression(optimizer_state=optimizer_state), at_cut)
    assert still(module, at_cut) == []
    own = {id(one) for one in module.parameters()}
    levels = with_inner(trainer.optimizers)
    assert len(levels) > 1
    for level in levels:
        assert {id(one) for group in level.param_groups for one in group["params"]} <= own
        assert {id(one) for one in level.state} <= own
    outer = trainer.optimizers[0]
    assert {id(one) for group in outer.param_groups for one in group["params"]} == own


class Shown(SGD):
    """S1: what it shows as its groups is made anew each time, so that edits of it are lost."""

    @property
    def param_groups(self):
        return [{**group, "params": list(group["params"])} for group in self.hidden]

    @param_groups.setter
    def param_groups(self, groups):
        self.hidden = groups

    def add_param_group(self, group):
        self.hidden.append({**self.defaults, **group, "params": list(group["params"])})


@pytest.mark.situation("Optimizers", "groups that cannot be edited", "refused")
def test_an_optimizer_that_would_not_train_the_factors_ends_the_run_and_nothing_is_changed(fit, new_module):
    module = new_module(lambda one: Shown(one.parameters(), lr=0.05))
    names = list(module.state_dict())
    with pytest.raises(
        RuntimeError, match=r"Shown: the parameters of its `param_groups` must be.*the edit they lack.*Nothing was"
    ):
        fit(module, compression())
    assert list(module.state_dict()) == names


class Frozen(SGD):
    """Its groups hold tuples."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["params"] = tuple(group["params"])


def test_groups_that_hold_tuples_end_the_run_and_nothing_is_changed(fit, new_module):
    module = new_module(lambda one: Frozen(one.parameters(), lr=0.05))
    names = list(module.state_dict())
    with pytest.raises(
        RuntimeError, match=r"Frozen: .* must be lists that can be edited in place, they are of type tuple"
    ):
        fit(module, compression())
    assert list(module.state_dict()) == names


class KnowsItsOwn(Optimizer):
    """S7: steps the parameters that it was made with, whatever its groups hold later."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.mine = [one for group in self.param_groups for one in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for one in self.mine:
            if one.grad is not None:
                one.sub_(one.grad, alpha=0.05)
        return loss


def test_an_optimizer_that_leaves_new_parameters_where_they_are_is_warned_of_once(fit, new_module):
    module, at_cut = new_module(lambda one: KnowsItsOwn(one.parameters(), lr=0.05)), AtCut()
    with pytest.warns(UserWarning, match="KnowsItsOwn: its first step after the compression moved none") as caught:
        fit(module, compression(), at_cut)
    assert len([one for one in caught if "moved none" in str(one.message)]) == 1
    assert len(still(module, at_cut)) >= 2


class Mine(SGD):
    """Of another module than torch's, but with nothing of its own."""


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "a rate of zero first"])
def test_an_optimizer_that_steps_its_groups_is_not_warned_of(warm, fit, new_module):
    def optimize(module):
        made = Mine(module.parameters(), lr=0.05, momentum=0.9)
        module.on_train_epoch_start = lambda: made.register_step_post_hook(lambda *_: None)  # a hook after ours
        schedule = lr_scheduler.LambdaLR(made, lambda step: 0.0 if warm and step in (0, 4) else 1.0)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, at_cut = new_module(optimize), AtCut()
    fit(module, compression(), at_cut)  # a warning would be an error
    assert still(module, at_cut) == []


@pytest.fixture
def group(tmp_path):
    """Return nothing: a group of one process, as optimizers of torch.distributed need one to be made."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(module):
    return ZeroRedundancyOptimizer(module.parameters(), optimizer_class=SGD, lr=0.05)


def averaged(module):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    inner = SGD(module.parameters(), lr=0.05)
    made = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=4))
    made.defaults = inner.defaults  # without it Lightning takes no such optimizer
    return made


@pytest.mark.parametrize(
    ("name", "optimize"),
    [
        pytest.param(name, make, marks=pytest.mark.situation("Optimizers", name, "refused"))
        for name, make in {"ZeroRedundancyOptimizer": sharded, "PostLocalSGDOptimizer": averaged}.items()
    ],
)
def test_optimizers_of_torch_distributed_are_refused_before_the_first_step(group, name, optimize, fit, new_module):
    module = new_module(optimize)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=rf"{name} does not:.*Give the optimizer inside it"):
        fit(module, compression())
    assert all(torch.equal(one, before[key]) for key, one in module.state_dict().items())


def test_schedulers_still_turn_the_rate_of_the_optimizer_that_steps(fit, new_module):
    """S2: an optimizer made anew would step at a rate that no scheduler reaches."""

    def optimize(module):
        made = SGD(module.parameters(), lr=0.05)
        return {"optimizer": made, "lr_scheduler": lr_scheduler.ExponentialLR(made, 0.5)}

    module, seen = new_module(optimize), []

    class Objects(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
            assert scheduler.optimizer is optimizer
            seen.append((id(optimizer), [id(one) for one in optimizer.param_groups]))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.last = weight(pl_module).clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                gradient = next(pl_module.network[8].parameters()).grad
                moved.append(float((weight(pl_module) - self.last).abs().max() / gradient.abs().max()))

    def weight(module):
        return next(module.network[8].parameters()).detach()

    moved = []
    watch = Objects()
    fit(module, watch, compression(), watch)
    assert isinstance(module.network[8], lrc.FactorizedLinear)
    assert len({str(one) for one in seen}) == 1
    assert moved[::2] == pytest.approx([0.05, 0.025, 0.0125], rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Adadelta(params, lr=1.0),
        lambda params: RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    ],
    ids=["Adadelta", "RMSprop"],
)
def test_squares_are_not_projected_as_if_they_were_gradients(make, fit, new_module):
    """S12: so projected they may be negative, and their roots not numbers, epochs later."""
    module = new_module(lambda one: make(one.parameters()))
    with pytest.warns(UserWarning, match=r"'project' is for SGD, Adam and AdamW; factors start without state in"):
        trainer = fit(module, compression(optimizer_state="project"), max_epochs=5)
    assert all(bool(one.isfinite().all()) for one in module.parameters())
    for state in trainer.optimizers[0].state.values():
        squares = [value for name, value in state.items() if name in ("square_avg", "acc_delta")]
        assert squares and all(bool((one >= 0).all()) for one in squares)
