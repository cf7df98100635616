"""Networks side by side: structure and weights of their files, times in turns, metrics."""

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lr_callback as lrc
from lr_callback.commands.measured import evaluated, evaluator, networks, sized, timed_stages, times_of
from lr_callback.layers import FactorizedLayer
from lr_callback.observation.report import Stage

CPU = torch.device("cpu")


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def val_dataloader(self):
        inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, torch.arange(16) % 4), batch_size=8)


@pytest.fixture
def files(tmp_path):
    module, written = Module(), {}
    for name in ("dense", "now"):
        if name == "now":
            lrc.factorize_(module, lrc.allocate(module, 0.5))
        with torch.no_grad():
            module.network[2].bias.fill_(len(written))
        written[name] = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": module.state_dict()}, written[name])
    return written


STAGES = tuple(Stage(name, {}, 0, 0, 0, 0.0) for name in ("before", "after"))


def test_each_network_is_that_of_its_file_and_the_given_one_is_left_alone(files):
    module = Module()
    made = networks(module, files)
    assert list(made) == ["dense", "now"]
    for name, model in made.items():
        written = torch.load(files[name], weights_only=True)["state_dict"]
        assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(one, FactorizedLayer) for one in [*module.modules(), *made["dense"].modules()])
    assert [stage.parameters for stage in sized(STAGES, made)] == [
        sum(one.numel() for one in model.parameters()) for model in made.values()
    ]


def test_without_a_dense_file_it_is_the_model_as_the_code_makes_it_without_factors(files):
    del files["dense"]
    module = Module()
    lrc.factorize_(module, lrc.allocate(module, 0.5))
    made = networks(module, files)
    assert list(made) == ["dense", "now"]
    assert not any(isinstance(one, FactorizedLayer) for one in made["dense"].modules())


def test_times_and_multiply_adds_are_of_the_batch_that_the_step_sees(files):
    module = Module()
    models = networks(module, files)
    times = times_of(Namespace(model=module, data=None, input_shape=None), models, CPU)
    assert times.multiply_adds[0] == 8 * (32 * 24 + 24 * 4) > times.multiply_adds[1]
    assert all(time > 0 for time in times.milliseconds) and times.batch == "8x32 float32"
    stages = timed_stages(STAGES, times)
    assert [(one.milliseconds, one.multiply_adds, one.spread) for one in stages] == list(
        zip(times.milliseconds, times.multiply_adds, times.spreads, strict=True)
    )
    with pytest.raises(ValueError, match="must take a batch of 2x5 float32, found that it makes a RuntimeError"):
        network = module.network
        times_of(Namespace(model=network, data=None, input_shape="2,5"), {"dense": network}, CPU)


class WithoutData(Module):
    val_dataloader = LightningModule.val_dataloader


class InTwoCalls(Module):
    """The same, in a step that calls one part after the other."""

    def validation_step(self, batch, batch_idx):
        first, activation, last = self.network
        self.log("val_loss", F.cross_entropy(last(activation(first(batch[0]))), batch[1]))


def test_a_step_may_call_several_modules(files):
    module = InTwoCalls()
    times = times_of(Namespace(model=module, data=None, input_shape=None), networks(module, files), CPU)
    assert times.multiply_adds[0] == 8 * (32 * 24 + 24 * 4) > times.multiply_adds[1]
    assert times.batch == "8x32 float32"


def test_without_data_what_is_called_is_not_known():
    module = WithoutData()
    with pytest.raises(ValueError, match=r"WithoutData: a test or validation step and data for it must .* no data"):
        times_of(Namespace(model=module, data=None, input_shape=None), {"dense": module}, CPU)


def test_metrics_are_those_of_each_network(files):
    models = networks(Module(), files)
    trainer = evaluator({}, CPU)
    both = [evaluated(stage, model, None, trainer) for stage, model in zip(STAGES, models.values(), strict=True)]
    for stage, model in zip(both, models.values(), strict=True):
        with torch.no_grad():
            losses = [F.cross_entropy(model.network(inputs), labels) for inputs, labels in model.val_dataloader()]
        assert stage.metrics == {"val_loss": pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)}
    assert both[0].metrics != both[1].metrics


@pytest.mark.parametrize(("kind", "text"), [(lambda: nn.Linear(2, 2), "a Linear has no"), (LightningModule, "no data")])
def test_what_cannot_be_evaluated_is_refused(kind, text):
    with pytest.raises(ValueError, match=text):
        evaluated(STAGES[0], kind(), None, evaluator({}, CPU))


def test_the_trainer_evaluates_as_the_run_did():
    trainer = evaluator({"trainer": {"precision": "bf16-true", "limit_val_batches": 3, "max_epochs": 9}}, CPU)
    assert (trainer.precision, trainer.limit_val_batches, trainer.max_epochs) == ("bf16-true", 3, None)
    assert not trainer.loggers and trainer.checkpoint_callback is None
    assert evaluator({"trainer": None}, None).precision == "32-true"
    with pytest.raises(ValueError, match=r"must evaluate on cpu as the run did, with .*3-bit.*Lightning refuses it: "):
        evaluator({"trainer": {"precision": "3-bit"}}, CPU)


def test_a_file_may_be_what_is_in_it(files):
    read = {name: torch.load(path, weights_only=True) for name, path in files.items()}
    for one, other in zip(networks(Module(), files).values(), networks(Module(), read).values(), strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
