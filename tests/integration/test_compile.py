"""torch.compile in its three forms: still compiled after more compressions than dynamo keeps versions of a graph."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import SGD

from lr_callback import FactorizedLinear, LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo looks at the gradients of intermediate values while it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
CUTS = 10
RATIOS = [0.9 - 0.07 * index for index in range(CUTS)]


class Counting:
    """A backend that runs graphs as they are, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def run(*arguments):
            self.calls += 1
            return graph.forward(*arguments)

        return run


class Network(LightningModule):
    def __init__(self, wrap=lambda network: network):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        self.network = wrap(network) or network

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05, momentum=0.9)


FORMS = {
    "the LightningModule": lambda backend: torch.compile(Network(), backend=backend),
    "a network inside, wrapped": lambda backend: Network(lambda one: torch.compile(one, backend=backend)),
    "a network inside, in place": lambda backend: Network(lambda one: one.compile(backend=backend)),
}


class Graphs(Callback):
    """Note how many graphs ran in each epoch, and the losses."""

    def __init__(self, backend):
        self.backend, self.ran, self.losses, self.cuts = backend, [], [], set()

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = self.backend.calls

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.cuts.add(sum(one.numel() for one in pl_module.parameters()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ran.append(self.backend.calls - self.before)


@pytest.fixture
def train(new_trainer, loader, tmp_path):
    """Return a function that trains for an epoch and for one after each of ten compressions."""

    def run(module, backend, **settings):
        torch.compiler.reset()
        compression = LowRankCompression(RATIOS, list(range(1, CUTS + 1)), show_table=False, **settings)
        graphs = Graphs(backend)
        trainer = new_trainer(tmp_path, compression, graphs, max_epochs=CUTS + 1, limit_train_batches=2)
        trainer.fit(module, loader())
        torch.compiler.reset()
        return graphs, trainer.lightning_module

    return run


@pytest.fixture(scope="module")
def eager(new_trainer, loader, tmp_path_factory):
    graphs = Graphs(Counting())
    compression = LowRankCompression(RATIOS, list(range(1, CUTS + 1)), show_table=False)
    trainer = new_trainer(tmp_path_factory.mktemp("eager"), compression, graphs, max_epochs=CUTS + 1,
                          limit_train_batches=2)  # fmt: skip
    trainer.fit(Network(), loader())
    return graphs


@pytest.mark.situation("Model features", "torch.compile in three forms, ten compressions", "works")
@pytest.mark.parametrize("form", FORMS)
def test_still_compiled_after_ten_compressions_and_equal_to_eager(train, eager, form):
    backend = Counting()
    graphs, module = train(FORMS[form](backend), backend)
    assert graphs.ran[0] >= 1  # the hooks that watch the first batch may keep it from being compiled
    assert set(graphs.ran[1:]) == {graphs.ran[-1]}
    assert graphs.ran[-1] >= 2
    assert graphs.losses == pytest.approx(eager.losses, rel=1e-5)
    assert len(graphs.cuts) == CUTS + 1
    assert any(isinstance(one, FactorizedLinear) for one in module.modules())


@pytest.mark.filterwarnings("ignore:.*recompile_limit")
def test_without_forgetting_old_graphs_dynamo_stops_compiling(train, monkeypatch):
    # What the reset after a compression is for; it raises nothing.
    monkeypatch.setattr("lr_callback.host.cut.torch.compiler.reset", lambda: None)
    backend = Counting()
    graphs, _ = train(FORMS["a network inside, wrapped"](backend), backend)
    assert graphs.ran[0] >= 1
    assert graphs.ran[1] == 2
    assert graphs.ran[-1] == 0


@pytest.mark.parametrize("select", [{"include": ["network.1"]}, {"exclude": ["network.3"]}], ids=str)
def test_names_are_those_of_the_network_that_was_compiled(new_trainer, loader, tmp_path, messages, select):
    module = FORMS["a network inside, wrapped"]("eager")
    compression = LowRankCompression(0.6, 1, **select)
    new_trainer(tmp_path, compression, max_epochs=2, limit_train_batches=2).fit(module, loader())
    table = next(text for text in messages if text.startswith("Low-rank compression at"))
    assert "network.1 " in table
    assert "_orig_mod" not in table
    assert list(compression.allocation.factorized) == ["network._orig_mod.1"]


def test_layer_that_is_compiled_on_its_own_stays_dense(new_trainer, loader, tmp_path):
    def wrap(network):
        network[1] = torch.compile(network[1], backend="eager")
        network[3].compile(backend="eager")
        network.append(nn.Linear(10, 10))
        return network

    compression = LowRankCompression(0.99, 1, show_table=False)
    module = Network(wrap)
    new_trainer(tmp_path, compression, max_epochs=2, limit_train_batches=2).fit(module, loader())
    skipped = compression.allocation.skipped
    assert list(skipped) == ["network.1._orig_mod", "network.3"]
    assert all("compiled on its own" in reason for reason in skipped.values())


def test_resumed_compiled_run_ends_as_the_uninterrupted_one(new_trainer, loader, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = FORMS["a network inside, wrapped"]("eager")
    new_trainer(tmp_path, LowRankCompression(0.5, 1), Save(), max_epochs=3).fit(whole, loader())
    again = FORMS["a network inside, wrapped"]("eager")
    resumed = new_trainer(tmp_path, LowRankCompression(0.5, 1), max_epochs=3)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "cut.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
