"""Settings of a Trainer, precisions and manual optimization hold after a cut as they did before."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import optim

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices_by_muon(module):
    """Give Muon the matrices that it can take, and SGD the rest; convolutions are no matrices."""
    layers = [module.network[8].weight, module.network[10].weight]
    rest = [one for one in module.parameters() if not any(one is other for other in layers)]
    return [optim.Muon(layers, lr=0.01), optim.SGD(rest, lr=0.05)]


OPTIMIZERS = {
    "SGD, momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "SGD, fused": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
    "AdamW": lambda params: optim.AdamW(params, lr=0.005),
    "Adam, fused": lambda params: optim.Adam(params, lr=0.005, fused=True),
}


def works(group, names):
    return [pytest.param(name, marks=pytest.mark.situation(group, name, "works"), id=name) for name in names]


SETTINGS = {
    "gradient accumulation": {"accumulate_grad_batches": 2},
    "accumulation over a rest": {"accumulate_grad_batches": 3},
    "clipping by norm": {"gradient_clip_val": 0.01},
    "clipping by value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("name", works("Trainer settings", SETTINGS))
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_settings_of_the_trainer_hold_after_the_cut(name, optimizer_state, trained, new_module):
    trained(new_module(), options={"optimizer_state": optimizer_state}, **SETTINGS[name])


def test_gradients_are_clipped_after_the_cut_too(trained, new_module):
    norms = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norms.append(float(torch.cat([one.grad.flatten() for one in pl_module.parameters()]).norm()))

    trained(new_module(), Norms(), gradient_clip_val=0.01, options={})
    assert len(norms) == 12
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]
TYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", works("Precision", PRECISIONS))
@pytest.mark.parametrize("name", ["SGD, fused", "AdamW"])
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_precision_is_kept_and_factors_train_in_it(precision, name, optimizer_state, trained, new_module):
    module = new_module(lambda one: OPTIMIZERS[name](list(one.parameters())))
    trained(module, precision=precision, options={"optimizer_state": optimizer_state})
    assert {one.dtype for one in module.parameters()} == {TYPES.get(precision, torch.float32)}


@pytest.mark.situation("Precision", "16-mixed", "works")
@pytest.mark.parametrize(
    ("name", "exponent"),
    # A first step that is skipped leaves torch's fused SGD with a momentum that was never written, with or without us.
    [("SGD, momentum", 30), ("SGD, fused", 12), ("AdamW", 30), ("Adam, fused", 30)],
)
def test_a_gradient_scaler_goes_on_through_the_cut(name, exponent, trained, new_module):
    # Lightning takes bf16 on the CPU where 16-mixed is asked for by name, but not where the plugin is given.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, backoff_factor=2.0**-8, growth_interval=3)
    scales = []

    class Scales(Callback):
        def on_train_batch_end(self, trainer, *_):
            scales.append(scaler.get_scale())

    module = new_module(lambda one: OPTIMIZERS[name](list(one.parameters())))
    trained(module, Scales(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], options={})
    assert (scales[0] < 2.0**exponent) is (exponent == 30)  # so large a scale overflows: the first step is skipped
    assert len(set(scales)) > 1


@pytest.mark.situation("Optimizers", "Muon for matrices, SGD for the rest, manual optimization", "works")
@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_the_factors_of_its_matrices(trained, new_module):
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
    trainer = trained(module, options={})
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


@pytest.mark.situation("Trainer settings", "several optimizers, manual optimization", "works")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_wrappers_that_a_module_keeps_step_the_factors(cached, optimizer_state, trained, new_module):
    trainer = trained(manual(new_module, cached), options={"optimizer_state": optimizer_state})
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

    module, first = Own(), {}

    class AtCut(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and not first:
                first.update({name: one.detach().clone() for name, one in pl_module.named_parameters()})

    module.mine = optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    with pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"):
        fit(module, LowRankCompression(0.5, 1, method=ALDS(), refit=None, show_table=False), AtCut())
    assert "network.8.encoder.weight" in first
    assert all(not torch.equal(one, first[name]) for name, one in module.named_parameters())
