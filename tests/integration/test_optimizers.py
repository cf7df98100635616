"""Every optimizer goes on after a cut: factors train, all else stays, and a resumed run is the uninterrupted one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import optim

import lr_callback as lrc
from lr_callback import LowRankCompression

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = 1
EPOCHS = 3


def matrices_by_muon(module):
    """Give Muon the matrices that it can take, and SGD the rest; convolutions are no matrices."""
    layers = [module.network[8].weight, module.network[10].weight]
    rest = [one for one in module.parameters() if not any(one is other for other in layers)]
    return [optim.Muon(layers, lr=0.01), optim.SGD(rest, lr=0.05)]


OPTIMIZERS = {
    "SGD": lambda params: optim.SGD(params, lr=0.05),
    "SGD, momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "SGD, nesterov": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, dampening=0.1, foreach=True),
    "SGD, fused": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda params: optim.Adam(params, lr=0.005, foreach=False),
    "Adam, foreach": lambda params: optim.Adam(params, lr=0.005, foreach=True),
    "Adam, fused": lambda params: optim.Adam(params, lr=0.005, fused=True),
    "Adam, amsgrad": lambda params: optim.Adam(params, lr=0.005, amsgrad=True),
    "AdamW": lambda params: optim.AdamW(params, lr=0.005),
    "AdamW, amsgrad, fused": lambda params: optim.AdamW(params, lr=0.005, amsgrad=True, fused=True),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "Adagrad, fused": lambda params: optim.Adagrad(params, lr=0.01, fused=True),
    "RMSprop": lambda params: optim.RMSprop(params, lr=1e-3),
    "RMSprop, centered, momentum": lambda params: optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "Rprop": lambda params: optim.Rprop(params, lr=1e-3),
    "Adadelta": lambda params: optim.Adadelta(params, lr=1.0),
    "Adamax": lambda params: optim.Adamax(params, lr=0.005),
    "NAdam": lambda params: optim.NAdam(params, lr=0.005),
    "RAdam": lambda params: optim.RAdam(params, lr=0.005),
    "ASGD": lambda params: optim.ASGD(params, lr=0.05),
    "Adafactor": lambda params: optim.Adafactor(params, lr=0.01),
    "LBFGS": lambda params: optim.LBFGS(params, lr=0.1, max_iter=3),
}
NOT_HERE = {
    "Muon": "takes matrices only, tried with others",
    "SparseAdam": "takes sparse gradients only, which no layer that is factorized has",
    "Optimizer": "the base class",
}


def test_every_optimizer_of_torch_is_tried():
    there = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert there - {name.partition(",")[0] for name in OPTIMIZERS} - NOT_HERE.keys() == set()


def compression(**options):
    return LowRankCompression(0.5, CUT, show_table=False, **options)


class Around(Callback):
    """Note the model and the optimizers just before and just after the cut, which is between two of these."""

    def __init__(self):
        self.weights, self.states, self.groups = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == CUT:
            self.weights.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})
            names = {id(one): name for name, one in pl_module.named_parameters()}
            of_name = [
                {names[id(one)]: copy.deepcopy(dict(state)) for one, state in each.state.items() if id(one) in names}
                for each in trainer.optimizers
            ]
            self.states.append(of_name)
            self.groups.append(
                [[names.get(id(one)) for g in each.param_groups for one in g["params"]] for each in trainer.optimizers]
            )


def same(one, other):
    """Compare nested dicts and lists; tensors must be equal in every bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def finished(trainer):
    return trainer.lightning_module.state_dict(), [each.state_dict() for each in trainer.optimizers]


def trained(fit, module, *callbacks, **settings):
    """Train with a cut and check that factors have moved, that nothing is infinite and that all else stayed."""
    around = Around()
    options = settings.pop("options", {})
    trainer = fit(module, around, compression(**options), around, *callbacks, max_epochs=EPOCHS, **settings)
    (dense, cut), now = around.weights, dict(module.named_parameters())
    factors = [name for name in cut if name not in dense and "coder.weight" in name]
    assert len(factors) >= 2
    assert [name for name in factors if torch.equal(now[name], cut[name])] == []
    assert all(bool(one.isfinite().all()) for one in now.values())
    assert all(same(dense[name], cut[name]) for name in dense.keys() & cut.keys())
    for before, after in zip(*around.states, strict=True):
        if not any("func_evals" in state for state in before.values()):  # LBFGS: its history is of all weights
            assert all(same(state, after[name]) for name, state in before.items() if name in cut)
    held = {id(one) for each in trainer.optimizers for group in each.param_groups for one in group["params"]}
    assert held == {id(one) for one in module.parameters()}
    assert all(set(map(id, each.state)) <= held for each in trainer.optimizers)
    return trainer


def resumed_is_uninterrupted(optimize, tmp_path, loader, new_module, new_trainer, fit, **options):
    """Resume from the file at the end of the epoch of the cut, everything made anew."""
    writer = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = trained(fit, new_module(optimize), writer, enable_checkpointing=True, options=options)
    again = new_trainer(tmp_path, compression(**options), max_epochs=EPOCHS)
    again.fit(new_module(optimize), loader(), loader(), ckpt_path=tmp_path / f"epoch={CUT}.ckpt")
    assert again.global_step == whole.global_step
    assert all(map(same, finished(whole), finished(again)))


RESUMING = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


def works(group, names):
    return [pytest.param(name, marks=pytest.mark.situation(group, name, "works"), id=name) for name in names]


@RESUMING
@pytest.mark.parametrize("name", works("Optimizers", OPTIMIZERS))
def test_each_optimizer_trains_the_factors_and_resumes_bit_for_bit(
    name, tmp_path, loader, new_module, new_trainer, fit
):
    def optimize(module):
        return OPTIMIZERS[name](list(module.parameters()))

    resumed_is_uninterrupted(optimize, tmp_path, loader, new_module, new_trainer, fit)


PROJECTED = [name for name in OPTIMIZERS if name.startswith(("SGD, ", "Adam"))]


@RESUMING
@pytest.mark.parametrize("name", works("Optimizers, momentum projected", [one for one in PROJECTED if one != "Adamax"]))
def test_projected_momentum_trains_on_and_resumes_bit_for_bit(name, tmp_path, loader, new_module, new_trainer, fit):
    def optimize(module):
        return OPTIMIZERS[name](list(module.parameters()))

    resumed_is_uninterrupted(optimize, tmp_path, loader, new_module, new_trainer, fit, optimizer_state="project")


def groups_by_kind(module):
    weights = [one for one in module.parameters() if one.dim() > 1]
    rest = [one for one in module.parameters() if one.dim() == 1]
    return optim.SGD([{"params": weights}, {"params": rest, "lr": 0.1, "weight_decay": 0.0}], lr=0.05, momentum=0.9)


def rate_of_each_layer(module):
    groups = [{"params": list(one.parameters())} for one in module.network if list(one.parameters())]
    return optim.AdamW([{**group, "lr": 0.01 * 0.8**index} for index, group in enumerate(groups)])


def rate_of_each_parameter(module):
    return optim.SGD([{"params": [one], "lr": 0.05} for one in module.parameters()], momentum=0.9)


def named(module):
    return optim.Adam(module.named_parameters(), lr=0.005)


def named_groups(module):
    of_name = list(module.named_parameters())
    biases = [pair for pair in of_name if pair[0].endswith("bias")]
    weights = [pair for pair in of_name if not pair[0].endswith("bias")]
    return optim.SGD([{"params": biases, "lr": 0.1}, {"params": weights}], lr=0.05, momentum=0.9)


GROUPS = {
    "weights and biases apart": groups_by_kind,
    "a rate for each layer": rate_of_each_layer,
    "a group for each parameter": rate_of_each_parameter,
    "named parameters": named,
    "groups of named parameters": named_groups,
}


@RESUMING
@pytest.mark.parametrize("name", works("Optimizers", GROUPS))
def test_groups_by_any_rule_resume_bit_for_bit(name, tmp_path, loader, new_module, new_trainer, fit):
    resumed_is_uninterrupted(GROUPS[name], tmp_path, loader, new_module, new_trainer, fit)


SETTINGS = {
    "gradient accumulation": {"accumulate_grad_batches": 2},
    "accumulation over a rest": {"accumulate_grad_batches": 3},
    "clipping by norm": {"gradient_clip_val": 0.01},
    "clipping by value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("name", works("Optimizers", SETTINGS))
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_settings_of_the_trainer_hold_after_the_cut(name, optimizer_state, fit, new_module):
    trained(fit, new_module(), options={"optimizer_state": optimizer_state}, **SETTINGS[name])


def test_gradients_are_clipped_after_the_cut_too(fit, new_module):
    norms = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norms.append(float(torch.cat([one.grad.flatten() for one in pl_module.parameters()]).norm()))

    trained(fit, new_module(), Norms(), gradient_clip_val=0.01)
    assert len(norms) == 4 * EPOCHS
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]
TYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", works("Precision", PRECISIONS))
@pytest.mark.parametrize("name", ["SGD, fused", "AdamW"])
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_precision_is_kept_and_factors_train_in_it(precision, name, optimizer_state, fit, new_module):
    module = new_module(lambda one: OPTIMIZERS[name](list(one.parameters())))
    trained(fit, module, precision=precision, options={"optimizer_state": optimizer_state})
    assert {one.dtype for one in module.parameters()} == {TYPES.get(precision, torch.float32)}


@pytest.mark.situation("Precision", "16-mixed", "works")
@pytest.mark.parametrize(
    ("name", "exponent"),
    # A first step that is skipped leaves torch's fused SGD with a momentum that was never written, with or without us.
    [("SGD, momentum", 30), ("SGD, fused", 12), ("AdamW", 30), ("Adam, fused", 30)],
)
def test_a_gradient_scaler_goes_on_through_the_cut(name, exponent, fit, new_module):
    # Lightning takes bf16 on the CPU where 16-mixed is asked for by name, but not where the plugin is given.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, backoff_factor=2.0**-8, growth_interval=3)
    scales = []

    class Scales(Callback):
        def on_train_batch_end(self, trainer, *_):
            scales.append(scaler.get_scale())

    module = new_module(lambda one: OPTIMIZERS[name](list(one.parameters())))
    trained(fit, module, Scales(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert (scales[0] < 2.0**exponent) is (exponent == 30)  # so large a scale overflows: the first step is skipped
    assert len(set(scales)) > 1


@pytest.mark.situation("Optimizers", "Muon for matrices, SGD for the rest, manual optimization", "works")
@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_the_factors_of_its_matrices(fit, new_module, tmp_path):
    class Module(new_module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for one in self.optimizers():
                one.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for one in self.optimizers():
                one.step()
            return loss

    module = Module(matrices_by_muon)
    trainer = trained(fit, module)
    assert all(one.dim() == 2 for one in trainer.optimizers[0].param_groups[0]["params"])
    assert isinstance(module.network[8], lrc.FactorizedLinear)


def test_muon_takes_no_convolution_with_or_without_a_cut(new_module):
    if not hasattr(optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        optim.Muon([new_module().network[0].weight])


def manual(base, cached):
    """Return a module that steps two optimizers by hand, whose wrappers it asks for each time or keeps."""

    class Manual(base):
        def __init__(self):
            super().__init__(two_optimizers)
            self.automatic_optimization = False
            self.kept = []

        def training_step(self, batch, batch_idx):
            if not (cached and self.kept):
                self.kept[:] = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for one in self.kept:
                one.zero_grad()
            self.manual_backward(loss)
            for one in self.kept:
                self.clip_gradients(one, gradient_clip_val=1.0)
                one.step()
            return loss

    return Manual()


def two_optimizers(module):
    early, late = list(module.network[:6].parameters()), list(module.network[6:].parameters())
    return [optim.Adam(early, lr=0.005), optim.SGD(late, lr=0.05, momentum=0.9, fused=True)]


@pytest.mark.situation("Optimizers", "several, manual optimization", "works")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_wrappers_that_a_module_keeps_step_the_factors(cached, optimizer_state, fit, new_module):
    trainer = trained(fit, manual(new_module, cached), options={"optimizer_state": optimizer_state})
    names = {id(one): name for name, one in trainer.lightning_module.named_parameters()}
    early, late = ([names[id(one)] for one in each.param_groups[0]["params"]] for each in trainer.optimizers)
    assert {name.split(".")[1] for name in early} == {"0", "1", "3", "4"}
    assert {name.split(".")[1] for name in late} == {"8", "10"}


@pytest.mark.situation("Optimizers", "an attribute of the module, unknown to the Trainer", "works")
def test_an_optimizer_that_the_trainer_does_not_know_follows_too(fit, new_module):
    class Own(new_module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.mine.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.mine.step()

        def configure_optimizers(self):
            return None

    module, around = Own(), Around()
    module.mine = optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    with pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"):
        fit(module, around, compression(), around)
    cut = around.weights[1]
    assert "network.8.encoder.weight" in cut
    assert all(not torch.equal(one, cut[name]) for name, one in module.named_parameters())
