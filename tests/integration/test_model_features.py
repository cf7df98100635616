"""What a module is made of and how it is called: recomputed, laid out otherwise, hooked, shared, held elsewhere."""

from itertools import cycle, islice

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lr_callback import ALDS, FactorizedConv2d, FactorizedLinear, LowRankCompression
from lr_callback.layers import FactorizedLayer

pytestmark = pytest.mark.usefixtures("one_thread")


class Base(LightningModule):
    """A classifier of digits; ``forward`` and the layers are its subclass's."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.build()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05, momentum=0.9)


class Plain(Base):
    def build(self):
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.last(self.first(images))


class Recomputed(Plain):
    def forward(self, images):
        return checkpoint(self.last, checkpoint(self.first, images, use_reentrant=False), use_reentrant=False)


class RecomputedInParts(Plain):
    def forward(self, images):
        return checkpoint_sequential([*self.first, *self.last], 3, images, use_reentrant=False)


def compression(**settings):
    return LowRankCompression([0.6, 0.3], [1, 2], method=ALDS(), refit=None, show_table=False, **settings)


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def train(fit, module, *callbacks, **settings):
    losses = Losses()
    fit(module, *(callbacks or [compression()]), losses, max_epochs=4)
    return losses.values


@pytest.mark.situation("Model features", "gradient checkpointing, also of a sequence in parts", "works")
@pytest.mark.parametrize("kind", [Recomputed, RecomputedInParts])
def test_recomputed_activations_change_no_loss(fit, kind):
    module = kind()
    assert train(fit, module) == train(fit, Plain())
    assert isinstance(module.first[2], FactorizedConv2d)


@pytest.mark.parametrize("kind", [Recomputed, RecomputedInParts])
def test_what_is_recomputed_in_the_backward_pass_is_not_counted_as_the_networks_cost(fit, kind):
    counted = {}
    for each in (Plain, kind):
        found = compression(cost="multiply_adds")
        fit(each(), found)
        counted[each] = found.allocation.dense_cost
    assert counted[kind] == counted[Plain]


@pytest.mark.situation("Model features", "channels_last", "works")
def test_memory_format_is_kept_and_changes_no_loss(fit):
    module = Plain().to(memory_format=torch.channels_last)
    assert train(fit, module) == pytest.approx(train(fit, Plain()), rel=1e-4)
    weights = [one.weight for one in module.first[2].modules() if type(one) is nn.Conv2d]
    assert len(weights) == 2
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
    assert any(not one.is_contiguous() for one in weights)


@pytest.mark.situation("Model features", "forward and backward hooks", "works")
def test_hooks_go_on_and_their_handles_still_remove_them(fit):
    module, calls = Plain(), {"before": [], "after": [], "backward": []}
    layer = module.last[1]
    handles = [
        layer.register_forward_pre_hook(lambda one, inputs: calls["before"].append(type(one))),
        layer.register_forward_hook(lambda one, inputs, outputs: calls["after"].append(type(one))),
        layer.register_full_backward_hook(lambda one, inner, outer: calls["backward"].append(type(one))),
    ]
    fit(module, compression(), max_epochs=3, limit_val_batches=0)
    for name, seen in calls.items():
        # One call more where a hook is asked when the multiply-adds of the first batch are counted.
        extra = name != "backward"
        assert seen == [nn.Linear] * (4 + extra) + [FactorizedLinear] * 8, name
    for handle in handles:
        handle.remove()
    module(torch.zeros(2, 1, 8, 8)).sum().backward()
    assert [len(seen) for seen in calls.values()] == [13, 13, 12]


class HeldElsewhere(Plain):
    def build(self):
        super().build()
        self.held = self.hold(*self.first)

    def hold(self, *layers):
        return cycle(layers)

    def forward(self, images):
        layers = self.held() if callable(self.held) else islice(self.held, 3)
        for layer in layers:
            images = layer(images)
        return self.last(images)


class HeldByAClosure(HeldElsewhere):
    def hold(self, *layers):
        return lambda: layers


@pytest.mark.situation("Model features", "layers called from a plain list, a closure or an object", "works")
def test_layer_that_a_closure_holds_stays_dense_and_says_why(fit):
    module, callback = HeldByAClosure(), LowRankCompression(0.5, 1, method=ALDS(), refit=None, show_table=False)
    losses = train(fit, module, callback)
    assert losses[-1] < losses[0]
    assert isinstance(module.last[1], FactorizedLinear)
    assert "held by the attribute held of the model too" in callback.allocation.skipped["first.2"]


@pytest.mark.situation("Model features", "layers called from where they cannot be found", "refused")
def test_layer_that_is_called_from_elsewhere_is_reported_at_the_first_batch(fit):
    # Without the report the dense layers would go on being called, and nothing that is called would train.
    module, losses = HeldElsewhere(), Losses()
    with pytest.raises(RuntimeError, match=r"this layer was replaced by LowRankCompression.*exclude=\['first.2'\]"):
        fit(
            module, losses, LowRankCompression(0.9, 1, method=ALDS(), refit=None, include=["first.2"], show_table=False)
        )
    assert len(losses.values) == 4


def test_layer_that_is_held_elsewhere_may_be_excluded(fit):
    module = HeldElsewhere()
    losses = train(
        fit, module, LowRankCompression(0.5, 1, method=ALDS(), refit=None, exclude=["first.*"], show_table=False)
    )
    assert losses[-1] < losses[0]
    assert isinstance(module.last[1], FactorizedLinear)
    assert not any(isinstance(one, FactorizedConv2d) for one in module.modules())


def test_layer_can_be_called_again_when_the_cut_fails(fit, monkeypatch):
    module, before = Plain(), {}

    class Keep(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            before.update(enumerate(pl_module.modules()))

    def fail(*_):
        raise MemoryError("injected")

    monkeypatch.setattr("lr_callback.host.cut.forget_graphs", fail)
    with pytest.raises(MemoryError, match="injected"):
        fit(module, Keep(), compression())
    assert list(module.modules()) == list(before.values())
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


class Attention(Base):
    def build(self):
        self.embed = nn.Linear(8, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        rows = self.encoder(self.embed(images.squeeze(1)))
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


@pytest.mark.situation("Model features", "nn.MultiheadAttention, nn.TransformerEncoderLayer", "works")
def test_attention_trains_and_is_evaluated_while_its_own_projections_stay(fit):
    module = Attention()
    losses = train(fit, module, LowRankCompression([0.9, 0.8], [1, 2], method=ALDS(), refit=None, show_table=False))
    assert losses[-1] < losses[0]
    assert isinstance(module.encoder.linear1, FactorizedLinear)
    assert not any(isinstance(one, FactorizedLayer) for one in module.attention.modules())
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(images), module.train()(images))


class Shared(Base):
    def build(self):
        self.start = nn.Linear(64, 32)
        self.middle = nn.Linear(32, 32)
        self.again = nn.ModuleList([self.middle, nn.Linear(32, 10), self.middle])

    def forward(self, images):
        values = self.again[0](self.start(images.flatten(1)).relu()).relu()
        return self.again[1](self.again[2](self.middle(values).relu()).relu())


@pytest.mark.situation("Model features", "a layer under several names", "works")
def test_shared_layer_stays_shared_and_is_in_the_optimizer_once(fit, new_watch):
    module, watch = Shared(), new_watch()
    losses = train(fit, module, compression(), watch)
    assert losses[-1] < losses[0]
    assert module.middle is module.again[0] is module.again[2]
    assert isinstance(module.middle, FactorizedLinear)
    assert watch.strangers == []


@pytest.mark.situation("Model features", "attributes of a weight, as `_no_weight_decay`", "works")
def test_attributes_of_a_weight_are_on_its_factors_after_a_cut_and_a_resumed_one(
    tmp_path, new_module, new_trainer, loader
):
    def marked():
        module = new_module()
        module.network[8].weight._no_weight_decay = True
        return module

    first = new_trainer(tmp_path, LowRankCompression(0.5, 1, method=ALDS(), refit=None, show_table=False), max_epochs=2)
    first.fit(marked(), loader(), loader())
    first.save_checkpoint(tmp_path / "cut.ckpt")
    again = new_trainer(tmp_path, LowRankCompression(0.5, 1, method=ALDS(), refit=None, show_table=False), max_epochs=3)
    again.fit(marked(), loader(), loader(), ckpt_path=tmp_path / "cut.ckpt")
    for trainer in (first, again):
        assert all(factor._no_weight_decay for factor in trainer.lightning_module.network[8].factors)


def test_hook_on_the_gradient_of_a_weight_is_warned_of_at_the_cut(fit, new_module):
    module = new_module()
    module.network[8].weight.register_hook(lambda gradient: None)
    with pytest.warns(UserWarning, match=r"found some at network\.8\. Register it again on the new weights"):
        fit(module, LowRankCompression(0.5, 1, method=ALDS(), refit=None, show_table=False))
