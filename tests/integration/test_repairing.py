"""Repairs at a cut inside ``Trainer.fit``: refit and statistics, on batches of the run's own training."""

import copy
import random
import re
import sys
import warnings
from collections import deque

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

import lr_callback as lrc
from lr_callback.host.calibration import calibration_calls
from lr_callback.host.repairing import Repairing
from lr_callback.repair.lockstep import this_walk

pytestmark = pytest.mark.filterwarnings("ignore:The calibration batches are few")


class Augmented(Dataset):
    """Images with noise drawn anew each time."""

    def __init__(self, size=96):
        self.images = torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(3, 6, 6), index % 4


class Network(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(16, 16, 3)
        )
        self.head = nn.Linear(256, 4)
        self.seen = MeanMetric()
        self.steps, self.losses = 0, []

    def forward(self, images):
        return self.head(torch.relu(self.body(images)).flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.seen(loss.detach())
        self.log("loss", loss)
        self.log_dict({"seen": self.seen})
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Compared(lrc.LowRankCompression):
    """Compare the network right after the cut with that right before."""

    def compress(self, trainer, pl_module, keep_ratio):
        images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(9))
        dense = copy.deepcopy(nn.ModuleList([pl_module.body, pl_module.head])).eval()
        report = super().compress(trainer, pl_module, keep_ratio)
        cut = copy.deepcopy(nn.ModuleList([pl_module.body, pl_module.head])).eval()
        with torch.no_grad():
            one, other = (of[1](torch.relu(of[0](images)).flatten(1)) for of in (dense, cut))
        self.off = ((one - other).norm() / one.norm()).item()
        return report


def trainer_of(callback, **options):
    """Return a Trainer that writes nothing, with one callback."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **options,
    )


def fit(tmp_path, module=None, loader=None, epochs=2, ckpt_path=None, limit=None, **options):
    torch.manual_seed(1)
    callback = Compared(0.5, epochs=1, show_table=False, **{"method": lrc.ALDS(), "refit": None, **options})
    trainer = trainer_of(callback, max_epochs=epochs, limit_train_batches=limit, default_root_dir=tmp_path)
    module = module or Network()
    ours = DataLoader(Augmented(), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(3))
    trainer.fit(module, ours if loader is None else loader, ckpt_path=ckpt_path)
    return trainer, module, callback


@pytest.mark.situation("Repair", "decoders refitted on training batches", "works")
@pytest.mark.situation("Repair", "errors weighted by activations", "works")
def test_the_network_right_after_the_cut_is_closer_to_that_before_with_a_refit(tmp_path):
    off, loader = {}, DataLoader(Augmented(640), batch_size=64)
    for refit in (None, "dense", "cut"):
        _, _, callback = fit(tmp_path, loader=loader, refit=refit, calibration_batches=10)
        off[refit] = callback.off
    assert off["cut"] < off["dense"] < off[None]
    _, module, callback = fit(tmp_path, refit="cut", method=lrc.ALDS("activation"), recalibrate_batchnorm=True)
    assert callback.allocation.error == "activation"
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.situation("Repair", "layers weighed by what their errors do to the outputs", "works")
def test_layers_are_weighed_by_their_effects_on_training_batches(tmp_path):
    class Parts(Network):
        """Calls its parts in the step, one after the other, and never itself."""

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(torch.relu(self.body(batch[0])).flatten(1)), batch[1])

    weights = []
    for module in (Network(), Parts()):
        for options in ({"method": lrc.ALDS("activation", "loss", power=4)}, {"method": lrc.ALDS(objective="loss")}):
            _, _, callback = fit(tmp_path, module=copy.deepcopy(module), refit="cut", **options)
            weights.append(callback.allocation.weights)
            assert set(callback.allocation.layers) == set(weights[-1]) and min(weights[-1].values()) > 0
            assert callback.allocation.method["objective"] == "loss"
    assert all(sorted(one) == ["body.0", "body.4", "head"] and len(set(one.values())) == 3 for one in weights)


@pytest.mark.situation("Repair", "errors weighted by what BatchNorm makes of them", "works")
def test_outputs_are_weighed_by_the_batchnorm_after_them(tmp_path):
    _, _, callback = fit(tmp_path, method=lrc.ALDS("batchnorm"))
    assert callback.allocation.error == "batchnorm" and callback.allocation.factorized


class WithAdam(Network):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.situation("Repair", "errors weighted by the mean squared gradients that Adam keeps", "works")
def test_the_state_of_adam_weighs_the_layers_and_afterwards_that_of_the_factors(tmp_path):
    seen = []

    class Twice(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            seen.append(lrc.fisher_importance(pl_module, optimizers=trainer.optimizers))
            return super().compress(trainer, pl_module, keep_ratio)

    callback = Twice([0.6, 0.4], [1, 2], method=lrc.ALDS("fisher"), show_table=False)
    trainer = trainer_of(callback, max_epochs=3)
    module = WithAdam()
    trainer.fit(module, DataLoader(Augmented(), batch_size=32))
    assert [sorted(one) for one in seen] == [["body.0", "body.4", "head"]] * 2
    assert callback.allocation.error == "fisher" and callback.allocation.keep_ratio == 0.4
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.situation("Repair", "errors weighted by mean squared gradients, and no optimizer keeps any", "refused")
def test_without_mean_squares_errors_cannot_be_weighted_by_them(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"error='fisher' .* Adam, AdamW or RMSprop keep, and SGD keeps"
    ):
        fit(tmp_path, method=lrc.ALDS("fisher"))

    trainer = trainer_of(lrc.LowRankCompression(0.5, 0, method=lrc.ALDS("fisher")), max_epochs=1)
    with pytest.raises(ValueError, match=r"no layer has mean squared .*\(AdamW\): .* from their first step on"):
        trainer.fit(WithAdam(), DataLoader(Augmented(), batch_size=32))


def test_the_calibration_leaves_no_trace(tmp_path):
    """Batches, random numbers, metrics and logs of a run that measures and changes nothing are those of any run."""

    class Asked(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            if self.repairing.refit:
                before = [
                    copy.deepcopy(vars(pl_module.seen)["mean_value"]),
                    len(pl_module.losses),
                    torch.get_rng_state(),
                ]
                calls = calibration_calls(trainer, pl_module, 2)
                assert len(calls) == 2 and pl_module.training and all(one.seen for one in calls)
                assert torch.equal(before[0], pl_module.seen.mean_value)
                assert before[1] == len(pl_module.losses)
                assert torch.equal(before[2], torch.get_rng_state())
                assert "log" not in vars(pl_module)

    ends = []
    for refit in (None, "cut"):
        torch.manual_seed(1)
        callback = Asked(0.5, epochs=1, refit=refit, calibration_batches=2)
        loader = DataLoader(Augmented(), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(3))
        trainer = trainer_of(callback, max_epochs=2)
        module = Network()
        trainer.fit(module, loader)
        ends.append((module.losses, {name: value.clone() for name, value in module.state_dict().items()}))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


@pytest.mark.filterwarnings("ignore:.*are never reached")
@pytest.mark.situation("Repair", "a run that is resumed right before the cut takes the same batches", "works")
def test_a_run_that_is_resumed_before_the_cut_is_the_same_run(tmp_path):
    options = {"refit": "cut", "recalibrate_batchnorm": True, "method": lrc.ALDS("activation")}

    def loader():
        return DataLoader(TensorDataset(torch.randn(96, 3, 6, 6), torch.arange(96) % 4), batch_size=32)

    torch.manual_seed(5)
    batches = loader()

    class Plain(Network):
        def __init__(self):
            super().__init__()
            del self.body[3]

    _, whole, _ = fit(tmp_path / "whole", module=Plain(), loader=batches, epochs=3, **options)
    first, _, _ = fit(tmp_path / "first", module=Plain(), loader=batches, epochs=1, **options)
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    _, resumed, _ = fit(tmp_path / "second", module=Plain(), loader=batches, epochs=3, ckpt_path=path, **options)
    other = resumed.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:LowRankCompression. a cut costs more accuracy")
def test_a_failure_in_the_repair_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    kept, repair = {"calls": 0}, Repairing.repair

    def begun(self, trainer, pl_module, *arguments):
        pl_module.head.register_forward_hook(fail)
        return repair(self, trainer, pl_module, *arguments)

    def fail(layer, inputs, outputs):
        kept["calls"] += 1
        if kept["calls"] > 5:
            raise RuntimeError("the network has failed")

    monkeypatch.setattr(Repairing, "repair", begun)

    class Failing(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            kept["before"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
            kept["types"] = [type(one) for one in pl_module.modules()]
            return super().compress(trainer, pl_module, keep_ratio)

    module = Network()
    trainer = trainer_of(Failing(0.5, 1, refit="cut", recalibrate_batchnorm=True), max_epochs=2)
    with pytest.raises(RuntimeError, match="the network has failed"):
        trainer.fit(module, DataLoader(Augmented(), batch_size=32))
    assert kept["calls"] == 6
    assert [type(one) for one in module.modules()] == kept["types"]
    assert all(torch.equal(value, kept["before"][name]) for name, value in module.state_dict().items())
    assert "log" not in vars(module)


class Full(DummyLogger):
    """Fails at what a compression writes."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("compression") for name in metrics):
            raise OSError("no space left")


def test_a_failure_after_the_repair_puts_biases_and_batchnorm_layers_back(tmp_path):
    kept = {}

    class Noting(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            kept.update({name: value.clone() for name, value in pl_module.state_dict().items()})
            return super().compress(trainer, pl_module, keep_ratio)

    module = Network()
    trainer = trainer_of(Noting(0.5, 1, refit="cut"), max_epochs=2, log_every_n_steps=1)
    trainer.loggers = [Full()]
    with pytest.raises(OSError, match="no space left"):
        trainer.fit(module, DataLoader(Augmented(), batch_size=32))
    assert module.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


@pytest.mark.situation("Repair", "BatchNorm in train mode gives what the refit was made for", "works")
def test_training_begins_with_the_network_that_the_refit_has_found(tmp_path):
    class Met(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            report = super().compress(trainer, pl_module, keep_ratio)
            images = torch.cat([batch[0] for batch in trainer.train_dataloader])
            body = copy.deepcopy(pl_module.body[:2])
            with torch.no_grad():
                self.fixed, self.own = body.eval()(images), body.train()(images)
            return report

    met = Met(0.72, 6, include=["body.0", "head"], refit="cut", show_table=False)  # the statistics have settled
    trainer_of(met, max_epochs=7).fit(Network(), DataLoader(Augmented(256), batch_size=32))
    assert isinstance(met.allocation.layers["body.0"], lrc.Factorization)
    assert (met.own - met.fixed).norm() < 0.1 * met.fixed.norm()


class Manual(Network):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


@pytest.mark.situation("Repair", "automatic_optimization=False", "refused")
def test_what_cannot_be_calibrated_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"steps its optimizers itself.* Set refit=None"):
        fit(tmp_path, module=Manual(), refit="cut")

    class Silent(Network):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 0:
                return super().training_step(batch, batch_idx)
            return None

    with pytest.raises(MisconfigurationException, match=r"of 3 batch.es. none called a module with parameters"):
        fit(tmp_path, module=Silent(), refit="cut")


@pytest.mark.situation("Repair", "a training loader that can be gone through once", "refused")
def test_a_loader_that_can_be_gone_through_once_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="a Stream can be gone through only once"):
        fit(tmp_path, loader=Stream(), refit="cut", epochs=2, limit=4)


class OnlyInTraining(Network):
    """A network that cannot be run in eval mode again."""

    def forward(self, images):
        if not self.training and not self.__dict__.get("asked", True):
            raise ValueError("not now")
        self.asked = self.training
        return super().forward(images)


class Stream:
    """An iterator that has no beginning to return to."""

    def __init__(self):
        self.left = iter(DataLoader(Augmented(), batch_size=8))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.left)


UNREPEATED = {
    "manual optimization": (Manual, r"this module's steps its optimizers itself \(automatic_optimization=False\)"),
    "a stream": (Network, "a Stream can be gone through only once"),
    "a network that is not run again": (OnlyInTraining, "not now"),
}


@pytest.mark.situation("Repair", "refit='auto' where the training cannot be run for it: goes without", "works")
@pytest.mark.filterwarnings("ignore:.*multiply-adds are not reported")
@pytest.mark.parametrize("case", UNREPEATED)
def test_a_gentle_refit_goes_without_and_says_why(tmp_path, case):
    make, text = UNREPEATED[case]
    ends = []
    for method, refit in ((None, "auto"), (lrc.ALDS(), "auto"), (lrc.ALDS(), None)):
        loader = Stream() if case == "a stream" else DataLoader(Augmented(), batch_size=32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, _, callback = fit(tmp_path, module=make(), loader=loader, method=method, refit=refit, limit=3)
        told = [str(one.message) for one in caught if "factors are not refitted" in str(one.message)]
        assert len(told) == (refit is not None)
        assert all(
            re.search(rf"had: .*{text}.* With method=ALDS\(\) and refit=None this is not tried", one) for one in told
        )
        assert all(("errors are not weighted by activations" in one) == (method is None) for one in told)
        assert callback.allocation.error == "slice"
        assert callback.allocation is not None
        ends.append(callback.off)
    assert ends[0] == ends[1] == ends[2]
    if case != "a stream":
        with pytest.raises((MisconfigurationException, ValueError), match=text):
            fit(tmp_path, module=make(), refit="cut")


@pytest.mark.situation("Repair", "refit='auto' where the training can be run for it: as 'cut'", "works")
def test_a_gentle_refit_is_that_of_cut_where_it_can_be(tmp_path):
    ends = []
    for refit in ("auto", "cut"):
        loader = DataLoader(Augmented(640), batch_size=64)
        _, module, callback = fit(tmp_path, loader=loader, refit=refit, calibration_batches=10)
        ends.append((callback.off, module.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


@pytest.mark.situation("Repair", "by default: ranks by what layers see and do, and a refit", "works")
def test_the_default_is_the_best_method_and_a_refit(tmp_path):
    off, loader = {}, DataLoader(Augmented(640), batch_size=64)
    for name, options in {"default": {"method": None, "refit": "auto"}, "paper": {}}.items():
        _, _, callback = fit(tmp_path, loader=loader, calibration_batches=10, **options)
        off[name] = callback.off
    assert off["default"] < off["paper"]
    callback = lrc.LowRankCompression(0.5, 1, show_table=False)
    trainer_of(callback, max_epochs=2).fit(Network(), loader)
    method = callback.allocation.method
    assert method == lrc.ALDS("activation", "loss", power=4, shrinkage=0.5).to_dict()
    assert callback.allocation.weights


def test_few_batches_are_no_harm(tmp_path):
    """Layers that are hardly seen keep their factors, and their inputs count by mean squares alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        loader = DataLoader(Augmented(), batch_size=4)
        _, module, callback = fit(tmp_path, loader=loader, method=None, refit="auto", limit=2)
    assert callback.allocation.error == "activation" and callback.allocation.factorized
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


class Writing(Network):
    """Writes to its inputs, and takes them out of what holds them."""

    def forward(self, batch):
        return super().forward(batch.pop("images").mul_(2).sub_(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self({"images": batch[0]}), batch[1])


class Noted(Network):
    """Keeps what its steps gave, as attributes of several kinds."""

    def __init__(self):
        super().__init__()
        self.outputs, self.given, self.latest = {"train": []}, deque(maxlen=99), None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs["train"].append(loss.item())
        self.given.append(loss.item())
        self.latest, self.steps = str(batch_idx), self.steps + 1
        return loss

    def on_train_epoch_end(self):
        assert len(self.outputs["train"]) == len(self.given) == 3 and self.latest == "2"
        self.outputs["train"].clear()
        self.given.clear()


class LossAlone(Network):
    """Returns its loss, in a forward without scores."""

    def forward(self, images, labels):
        return nn.functional.cross_entropy(super().forward(images), labels)

    def training_step(self, batch, batch_idx):
        return self(*batch)


class InItsOwnDtype(Network):
    """Makes tensors of the default dtype in its forward."""

    def forward(self, images):
        return super().forward(images) + self.head(torch.ones(len(images), 256))


EVERYDAY = {
    "a network that writes to its inputs": (Writing, "32-true", "loss"),
    "a step that keeps what it gave": (Noted, "32-true", "loss"),
    "a network that returns a loss alone": (LossAlone, "32-true", "sum"),
    "a network that makes tensors, in 64-true": (InItsOwnDtype, "64-true", "loss"),
    "a network that makes tensors, in bf16-true": (InItsOwnDtype, "bf16-true", "loss"),
}


@pytest.mark.parametrize("case", EVERYDAY)
def test_the_default_needs_nothing_special(case):
    """The network can be run again, with no warning, and the layers are refitted."""
    make, precision, objective = EVERYDAY[case]
    callback, module = lrc.LowRankCompression(0.5, 1, show_table=False), make()
    trainer = trainer_of(callback, max_epochs=2, precision=precision)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Augmented(), batch_size=32))
    told = [str(one.message) for one in caught if "multiply-adds are not reported" not in str(one.message)]
    assert not [one for one in told if "calibration" in one or "LowRank" in one]
    method = callback.allocation.method
    assert (method["error"], method["objective"], method["power"]) == ("activation", objective, 4)
    if make is Noted:
        assert module.steps == 6 and len(module.losses) == 6


class Endless(IterableDataset):
    """A data set that is its own iterator."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        return torch.randn(3, 6, 6), self.given % 4


class Held(IterableDataset):
    """A data set that gives the same iterator each time."""

    def __init__(self):
        self.endless = Endless()

    def __iter__(self):
        return self.endless

    @property
    def given(self):
        return self.endless.given


@pytest.mark.parametrize("kind", [Endless, Held])
def test_a_data_set_that_is_its_own_iterator_or_has_one_is_not_gone_through(tmp_path, kind):
    taken = []
    for options in ({"method": None, "refit": "auto"}, {}):
        data = kind()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, loader=DataLoader(data, batch_size=8), limit=3, **options)
        told = [
            str(one.message) for one in caught if f"{kind.__name__} can be gone through only once" in str(one.message)
        ]
        assert len(told) == bool(options)
        taken.append(data.given)
    assert taken[0] == taken[1]


def test_random_numbers_are_the_same_after_a_calibration_that_failed(tmp_path):
    ends = []
    for options in ({"method": None, "refit": "auto"}, {}):
        random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path, module=OnlyInTraining(), limit=3, **options)
            fit(tmp_path, loader=DataLoader(Endless(), batch_size=8), limit=3, **options)
        ends.append((random.random(), torch.rand(1)))
    assert ends[0] == ends[1]


def test_a_gentle_refit_that_fails_leaves_the_cut_without_it(tmp_path):
    """Whatever it is, such as memory: the run goes on with what the cut itself has made, its mean made up for."""

    class Failing(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            self.walked = 0
            pl_module.body.register_forward_hook(self.count)
            return super().compress(trainer, pl_module, keep_ratio)

        def count(self, *_):
            self.walked += this_walk() is not None
            if this_walk() is not None and self.walked > 3:
                raise torch.OutOfMemoryError("no memory left")

    ends = []
    for refit in ("auto", None):
        torch.manual_seed(0)
        callback, module = Failing(0.5, 1, refit=refit, show_table=False), Network()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_of(callback, max_epochs=2).fit(module, DataLoader(Augmented(), batch_size=32))
        told = [str(one.message) for one in caught if "no memory left" in str(one.message)]
        assert len(told) == (refit is not None) and all("for factors are not refitted: " in one for one in told)
        assert callback.allocation.method["error"] == "activation"
        ends.append(module.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_layers_that_are_not_called_are_told_of_once(tmp_path):
    class Unused(Network):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(64, 64)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module=Unused(), method=None, refit="auto")
    assert len([one for one in caught if "unused" in str(one.message)]) == 1


def test_a_method_that_needs_the_batches_raises_as_ever(tmp_path):
    with pytest.raises(MisconfigurationException, match="steps its optimizers itself"):
        fit(tmp_path, module=Manual(), refit="auto", method=lrc.ALDS("activation"))


def test_each_part_of_a_cut_that_takes_time_is_shown_in_the_trainers_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # as in an interactive session
    options = {"refit": "cut", "recalibrate_batchnorm": True, "method": lrc.ALDS("activation", "loss")}
    compression = lrc.LowRankCompression(0.5, 0, show_table=False, **options)
    shown = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, callbacks=[compression, TQDMProgressBar()], default_root_dir=tmp_path, **shown)
    trainer.fit(Network(), DataLoader(Augmented(), batch_size=32))
    found = capsys.readouterr().out
    for what, unit in [("calibration", "2/8"), ("importance", "2/3"), ("effects", "8/9"), ("refit", "body.4")]:
        assert re.search(rf"Low-rank {what}\|[^\r]*{unit}", found), what
    assert re.search(r"Low-rank BatchNorm\|[^\r]*2/3", found)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"refit": True}, "`refit` must be 'auto', 'cut', 'dense' or None, got True"),
        ({"refit": "both"}, "`refit` must be 'auto', 'cut', 'dense' or None, got 'both'"),
        ({"calibration_batches": 0}, "`calibration_batches` must be a whole number of at least 1, got 0"),
        ({"calibration_batches": 2.5}, "`calibration_batches` must be a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        lrc.LowRankCompression(0.5, 1, **options)


@pytest.mark.parametrize("switch", ["correct_biases", "rebase_batchnorm", "recalibrate_batchnorm"])
def test_a_switch_of_a_repair_that_is_neither_on_nor_off_is_refused(switch):
    with pytest.raises(TypeError, match=f"`{switch}` must be True or False, got 'no'"):
        lrc.LowRankCompression(0.5, 1, **{switch: "no"})


@pytest.mark.situation("Repair", "each repair turned off", "works")
def test_each_repair_can_be_turned_off(tmp_path):
    names = ("body.1.running_mean", "body.1.running_var", "body.1.weight", "head.decoder.bias")
    held = {}

    class Held(Compared):
        """Keep what repairs change, right before and right after the cut."""

        def compress(self, trainer, pl_module, keep_ratio):
            before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            before["head.decoder.bias"] = before["head.bias"]
            report = super().compress(trainer, pl_module, keep_ratio)
            after = pl_module.state_dict()
            held["changed"] = [name for name in names if not torch.equal(before[name], after[name])]
            return report

    def changed(**options):
        torch.manual_seed(1)
        callback = Held(0.4, epochs=1, show_table=False, **{"method": lrc.ALDS("activation"), **options})
        trainer = trainer_of(callback, max_epochs=2, default_root_dir=tmp_path)
        module = Network()
        module.body[0] = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        trainer.fit(module, DataLoader(Augmented(), batch_size=32))
        return held["changed"]

    mean, variance, weight, bias = names
    assert changed(refit="cut") == [mean, variance, weight, bias]
    assert changed(refit="cut", rebase_batchnorm=False) == [mean, bias]
    assert changed(refit="cut", correct_biases=False) == [variance, weight]
    assert changed(refit="cut", correct_biases=False, rebase_batchnorm=False) == []
    assert changed(refit=None) == [mean, bias]
    assert changed(refit=None, correct_biases=False) == []
    assert changed(refit=None, correct_biases=False, recalibrate_batchnorm=True) == [mean, variance]


class Unmeasured(Network):
    """Reads the weights of its layers; nothing is seen of their inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(108, 64), nn.Linear(64, 4)

    def forward(self, images):
        hidden = nn.functional.linear(images.flatten(1), self.body.weight, self.body.bias)
        return nn.functional.linear(hidden.relu(), self.head.weight, self.head.bias)


class Constant(Network):
    """What comes into its layers does not vary."""

    def training_step(self, batch, batch_idx):
        return super().training_step((torch.zeros_like(batch[0]), batch[1]), batch_idx)


class LossOnly(Network):
    """Returns its loss, which cannot be compared."""

    def forward(self, images, labels=None):
        scores = super().forward(images)
        return scores if labels is None else nn.functional.cross_entropy(scores, labels)

    def training_step(self, batch, batch_idx):
        return self(*batch)


@pytest.mark.situation("Repair", "nothing is seen of the layers: ranks by their weights, with a warning", "works")
@pytest.mark.parametrize("options", [{}, {"recalibrate_batchnorm": True}, {"refit": "cut"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*layer.s. are not called on the first calibration batch")
@pytest.mark.filterwarnings("ignore:The model keeps what a run needs")
def test_a_method_that_was_left_open_does_without_what_cannot_be_measured(tmp_path, options):
    callback = lrc.LowRankCompression(0.6, epochs=1, show_table=False, **options)
    trainer = trainer_of(callback, max_epochs=2, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="for errors are not weighted by activations"):
        trainer.fit(Unmeasured(), DataLoader(Augmented(), batch_size=32))
    assert callback.allocation.method["name"] == "ALDS" and callback.allocation.error == "slice"
    assert callback.allocation.factorized


@pytest.mark.parametrize("module", [Constant, LossOnly])
@pytest.mark.parametrize("options", [{}, {"recalibrate_batchnorm": True}, {"refit": "cut"}], ids=str)
def test_without_outputs_to_compare_all_layers_count_alike_whatever_else_is_asked_for(tmp_path, module, options):
    callback = lrc.LowRankCompression(0.5, epochs=1, show_table=False, **options)
    trainer = trainer_of(callback, max_epochs=2, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LowRankCompression: a cut costs more accuracy")
        trainer.fit(module(), DataLoader(Augmented(), batch_size=32))
    found = callback.allocation
    assert found.factorized and found.method.get("objective") in ("sum", "minimax", "loss")
    if module is LossOnly:
        assert (found.error, found.method["objective"]) == ("activation", "sum")


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_batch_with_nan_is_refused_by_a_recalibration_and_the_run_stays_as_it_was(tmp_path):
    class Broken(Augmented):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image * torch.nan if self.broken else image), label

        broken = False

    data = Broken()

    class Breaking(lrc.LowRankCompression):
        def compress(self, trainer, pl_module, keep_ratio):
            data.broken = True
            return super().compress(trainer, pl_module, keep_ratio)

    module = Network()
    callback = Breaking(0.5, epochs=1, method=lrc.ALDS(), refit=None, recalibrate_batchnorm=True, show_table=False)
    trainer = trainer_of(callback, max_epochs=2, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"body\.1: the statistics of its inputs on the batches must be finite"):
        trainer.fit(module, DataLoader(data, batch_size=32))
    assert isinstance(module.body[0], nn.Conv2d) and module.body[1].running_mean.isfinite().all()
