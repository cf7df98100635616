"""A network of every layer type, cut while it trains: factors learn, averages follow, a resumed run is the same."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression
from lr_callback.layers import FactorizedLayer
from lr_callback.model.observe import observe

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
EPOCHS = 4
TYPES = {
    lrc.FactorizedEmbedding,
    lrc.FactorizedConv1d,
    lrc.FactorizedConv1D,
    lrc.FactorizedConv2d,
    lrc.FactorizedConv3d,
    lrc.FactorizedConvTranspose1d,
    lrc.FactorizedConvTranspose2d,
    lrc.FactorizedConvTranspose3d,
    lrc.FactorizedLinear,
}


class EveryType(nn.Module):
    """Reads an image as a grid of tokens, and passes it through one layer of each type."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(17, 12, padding_idx=0)
        self.grouped = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.up = nn.ConvTranspose2d(24, 12, 3, stride=2, padding=1, groups=3)
        self.sequence = nn.Conv1d(12, 24, 3, stride=2, padding="valid", groups=2)
        self.longer = nn.ConvTranspose1d(24, 12, 3, stride=2)
        self.volume = nn.Conv3d(3, 12, (3, 3, 2), padding=1)
        self.larger = nn.ConvTranspose3d(12, 8, 2, groups=2)
        self.mixed = Conv1D(32, 8)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        features = self.tokens((16 * images).long().squeeze(1)).movedim(-1, 1)
        features = torch.relu(self.norm(self.grouped(features)))
        features = torch.relu(self.up(features, output_size=[8, 8]))
        features = torch.relu(self.longer(torch.relu(self.sequence(features.flatten(2))), output_size=[64]))
        features = torch.relu(self.larger(torch.relu(self.volume(features.view(-1, 3, 4, 8, 8)))))
        return self.head(torch.relu(self.mixed(features.mean((2, 3, 4)))))


def made(new_module, optimize=None):
    module = new_module(optimize or (lambda one: SGD(one.parameters(), lr=0.05, momentum=0.9)))
    module.network = EveryType()
    return module


def compression(**options):
    method = lrc.ALDS(foldings=["kernel_in_encoder", "depth_in_decoder", "height_in_decoder"])
    return LowRankCompression(
        [0.6, 0.4], [1, 3], method=method, refit=None, embeddings=True, show_table=False, **options
    )


def types_in(module):
    return {type(one) for one in module.modules() if isinstance(one, FactorizedLayer)}


def finished(trainer):
    average = next(one for one in trainer.callbacks if isinstance(one, EMAWeightAveraging))
    return [trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict(), average.state_dict()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, loader, new_module, new_trainer):
    """Return an uninterrupted run with two cuts and an average that wrote a file at many moments."""
    root, module = tmp_path_factory.mktemp("whole"), made(new_module)
    files = [
        ModelCheckpoint(root, "{epoch}", save_top_k=-1),
        ModelCheckpoint(root, "mid-{step}", save_top_k=-1, every_n_train_steps=3),
    ]
    callbacks = [compression(), EMAWeightAveraging(decay=0.8), *files]
    trainer = new_trainer(root, *callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    return SimpleNamespace(root=root, module=module, end=copy.deepcopy(finished(trainer)), first=callbacks[0])


@pytest.mark.situation("Layers", "every layer type in one network, cut twice", "works")
def test_every_type_is_factorized_within_the_budget(run):
    assert types_in(run.module) >= TYPES - {lrc.FactorizedLinear, lrc.FactorizedConv1d}
    assert run.first.allocation.cost == sum(one.numel() for one in run.module.parameters())
    assert run.first.allocation.cost <= run.first.allocation.budget
    assert not run.module.network.tokens.weight[0].any()
    assert all(bool(one.isfinite().all()) for one in run.module.state_dict().values())


@pytest.mark.situation("Layers", "every layer type, resumed before, between and after two cuts", "works")
@pytest.mark.parametrize("moment", ["epoch=0.ckpt", "mid-step=6.ckpt", "epoch=2.ckpt", "mid-step=15.ckpt"])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    run, moment, tmp_path, loader, new_module, new_trainer, same
):
    trainer = new_trainer(tmp_path, compression(), EMAWeightAveraging(decay=0.8), max_epochs=EPOCHS)
    trainer.fit(made(new_module), loader(), loader(), ckpt_path=run.root / moment)
    for resumed, uninterrupted in zip(finished(trainer), run.end, strict=True):
        assert same(resumed, uninterrupted)


@pytest.mark.parametrize("optimizer_state", ["reset", "project"])
def test_factors_of_every_type_learn(trained, new_module, optimizer_state):
    module = made(new_module, lambda one: Adam(one.parameters(), lr=0.01))
    trained(module, options={"embeddings": True, "optimizer_state": optimizer_state})
    assert len(types_in(module)) >= 6


def test_a_file_is_restored_into_the_network_alone(run, same):
    fresh = EveryType()
    lrc.restore_(fresh, run.root / "mid-step=15.ckpt")
    again = EveryType()
    lrc.restore_(again, fresh.state_dict())
    assert same(again.state_dict(), fresh.state_dict())
    assert types_in(fresh) == types_in(run.module)
    lrc.densify_(fresh)
    assert types_in(fresh) == set()
    shapes = {name: one.shape for name, one in EveryType().state_dict().items()}
    assert {name: one.shape for name, one in fresh.state_dict().items()} == shapes


@pytest.mark.situation("Layers", "multiply-adds of every layer type, counted on the first batch", "works")
def test_budgets_in_multiply_adds_are_kept(fit, new_module):
    module = made(new_module)
    callback = compression(cost="multiply_adds")
    fit(module, callback, max_epochs=EPOCHS)
    inputs = torch.zeros(64, 1, 8, 8)
    assert callback.allocation.cost <= callback.allocation.budget
    assert observe(module, inputs).multiply_adds(module) == callback.allocation.cost


class Tokens(LightningModule):
    """A table with sparse gradients, which one optimizer trains, and a head, which another trains."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.automatic_optimization = kind, False
        self.tokens, self.head = nn.Embedding(64, 32, sparse=True), nn.Linear(32, 10)

    def training_step(self, batch):
        features, labels = batch
        tokens = self.tokens((8 * features.flatten(1)).long().clamp(0, 63)).mean(1)
        for one in self.optimizers():
            one.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.head(tokens), labels))
        for one in self.optimizers():
            one.step()

    def configure_optimizers(self):
        return self.kind(self.tokens.parameters(), lr=0.01), SGD(self.head.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # by Adagrad itself
@pytest.mark.situation("Layers", "an embedding with sparse gradients, trained by SGD or Adagrad", "works")
@pytest.mark.parametrize("kind", [SGD, torch.optim.Adagrad])
def test_factors_of_a_table_with_sparse_gradients_learn(kind, new_trainer, loader, tmp_path):
    module, started = Tokens(kind), []
    callback = LowRankCompression(0.5, 1, method=ALDS(), refit=None, embeddings=True, show_table=False)
    watching = LambdaCallback(on_train_epoch_start=lambda *_: started.append(copy.deepcopy(module.tokens)))
    new_trainer(tmp_path, callback, watching).fit(module, loader())
    assert isinstance(module.tokens, lrc.FactorizedEmbedding)
    assert module.tokens.encoder.sparse
    for before, after in zip(started[1].factors, module.tokens.factors, strict=True):
        assert not torch.equal(before, after)


@pytest.mark.situation("Layers", "an embedding with sparse gradients, trained by SparseAdam", "refused")
def test_a_table_that_sparse_adam_trains_is_refused_before_the_training_unless_it_is_left_out(
    new_trainer, loader, tmp_path
):
    module = Tokens(torch.optim.SparseAdam)
    before = copy.deepcopy(module.state_dict())
    callback = LowRankCompression(0.5, 1, method=ALDS(), refit=None, embeddings=True, show_table=False)
    with pytest.raises(MisconfigurationException, match=r"SparseAdam, which trains tokens, does not\. Name it in"):
        new_trainer(tmp_path, callback).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    left_out = LowRankCompression(
        0.9, 1, method=ALDS(), refit=None, embeddings=True, exclude=["tokens"], show_table=False
    )
    new_trainer(tmp_path, left_out).fit(module, loader())
    assert isinstance(module.head, lrc.FactorizedLinear)
    assert type(module.tokens) is nn.Embedding
