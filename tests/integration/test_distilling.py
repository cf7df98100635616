"""Distillation inside ``Trainer.fit``: the loss is the formula, the teacher the network before, the rest as it was."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lr_callback import ALDS, FactorizedConv2d, LowRankCompression, distillation_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo looks at the gradients of intermediate values while it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
LOGGED = "compression/distillation_loss"


def data(size=48):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 4)


def batches():
    return DataLoader(data(), batch_size=16)


class Network(LightningModule):
    """Batch norm, dropout, and a forward that writes to its inputs; ``form`` is that of what the step returns."""

    def __init__(self, form="tensor", dropout=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(16, 16, 3)
        )
        self.head = nn.Linear(256, 4)

    def forward(self, images):
        self.log("seen", float(images.sum()))
        return self.head(torch.relu(self.body(images.mul_(0.5))).flatten(1))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return {"loss": loss, "more": 1} if self.form == "dict" else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Noted(Callback):
    """Note inputs, losses and gradients of the batches, and what the teacher's weights are."""

    def __init__(self, compression):
        self.compression = compression
        self.dense, self.before, self.losses, self.gradients, self.teachers = {}, {}, [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.dense[trainer.current_epoch] = copy.deepcopy(pl_module).requires_grad_(False).eval()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        taken = [one.clone() for one in batch] if torch.is_tensor(batch[0]) else batch
        self.before.setdefault(trainer.global_step, (copy.deepcopy(pl_module), taken, torch.get_rng_state()))

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append([one.grad.clone() for one in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        teacher = self.compression.state_dict()["teacher"]
        self.teachers.append(None if teacher is None else {name: one.clone() for name, one in teacher.items()})


@pytest.fixture
def train(tmp_path, new_trainer):
    """Return a function that trains with one cut, at epoch 1 if not told otherwise, and what was noted."""

    def run(module=None, distill=0.3, epochs=1, ratios=0.5, ckpt_path=None, loader=None, callbacks=(), **settings):
        torch.manual_seed(1)
        own = {name: settings.pop(name) for name in ("method", "refit", "distill_temperature") if name in settings}
        compression = LowRankCompression(ratios, epochs, distill=distill, show_table=False, **own)
        noted = Noted(compression)
        trainer = new_trainer(tmp_path, noted, compression, *callbacks, **{"max_epochs": 2, **settings})
        trainer.fit(module or Network(), batches() if loader is None else loader, ckpt_path=ckpt_path)
        return trainer, noted, compression

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.situation("Repair", "distillation from the network before the first cut", "works")
@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_loss_and_gradients_are_those_of_the_formula_written_by_hand(train, form):
    _, noted, _ = train(Network(form), distill=0.3, distill_temperature=2.5)
    for step in (0, 3, 5):
        module, (images, labels), state = noted.before[step]
        teacher = noted.dense[1]
        torch.set_rng_state(state)
        module.log = teacher.log = lambda *_: None
        scores = module(images.clone())
        loss = F.cross_entropy(scores, labels)
        if step >= 3:
            assert isinstance(module.body[4], FactorizedConv2d)
            wanted, own = (torch.softmax(one / 2.5, 1) for one in (teacher(images.clone()), scores))
            loss = 0.7 * loss + 0.3 * 2.5**2 * (wanted * (wanted.log() - own.log())).sum(1).mean()
        loss.backward()
        assert noted.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        for found, parameter in zip(noted.gradients[step], module.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_mean_of_the_distillation_loss_is_logged_for_each_epoch(train):
    trainer, noted, _ = train(distill=1.0)
    assert trainer.callback_metrics[LOGGED].item() == pytest.approx(sum(noted.losses[3:]) / 3, rel=1e-5)


def test_teacher_is_the_network_before_the_first_cut_and_stays_so(train):
    _, noted, compression = train(epochs=[1, 2], ratios=[0.6, 0.4], max_epochs=3)
    assert noted.teachers[:3] == [None] * 3
    dense = noted.dense[1].state_dict()
    assert len(noted.teachers) == 9 and all(same(one, dense) for one in noted.teachers[3:])
    assert same(compression.state_dict()["teacher"], dense), "for a file that is written after the run"


@pytest.mark.situation("Repair", "distillation, gradient accumulation and bf16-mixed", "works")
def test_gradients_that_are_accumulated_under_autocast_are_those_of_the_formula(train):
    settings = {"accumulate_grad_batches": 3, "precision": "bf16-mixed"}
    _, noted, _ = train(distill=0.5, **settings)
    (module, _, state), teacher = noted.before[1], noted.dense[1]
    module.log = teacher.log = lambda *_: None
    taken = list(batches())  # draws a number
    torch.set_rng_state(state)
    for images, labels in taken:
        with torch.autocast("cpu", torch.bfloat16):
            wanted, scores = teacher(images.clone()), module(images.clone())
            assert wanted.dtype == scores.dtype == torch.bfloat16
            wanted, own = (torch.log_softmax(one.float() / 4, 1) for one in (wanted, scores))
            penalty = 16 * F.kl_div(own, wanted, log_target=True, reduction="batchmean")
            loss = 0.5 * F.cross_entropy(scores, labels) + 0.5 * penalty
        (loss / 3).backward()
    for found, parameter in zip(noted.gradients[5], module.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


class Plain(Network):
    """A network inside, whose calls can be compiled."""

    def __init__(self, wrap=lambda network: network):
        super().__init__()
        del self.body, self.head
        network = nn.Sequential(nn.Flatten(), nn.Linear(108, 48), nn.ReLU(), nn.Linear(48, 4))
        self.network = wrap(network) or network

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Graphs:
    """A backend that runs graphs as they are, and counts them and how often they run."""

    def __init__(self):
        self.made, self.calls = 0, 0

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*arguments):
            self.calls += 1
            return graph.forward(*arguments)

        return run


FORMS = {
    "the LightningModule": lambda backend: torch.compile(Plain(), backend=backend),
    "a network inside, wrapped": lambda backend: Plain(lambda one: torch.compile(one, backend=backend)),
    "a network inside, in place": lambda backend: Plain(lambda one: one.compile(backend=backend)),
}


@pytest.mark.situation("Repair", "distillation, torch.compile in three forms", "works")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_compiled_stays_compiled_and_learns_the_same(new_trainer, tmp_path, form):
    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses[-1].append(outputs["loss"].item())
            ran.append((backend.made, backend.calls))

    losses, ran, backend = [], [], Graphs()
    for make in (Plain, lambda: FORMS[form](backend)):
        torch.compiler.reset()
        losses.append([])
        compression = LowRankCompression(0.5, 1, distill=0.5, show_table=False)
        new_trainer(tmp_path, Losses(), compression, max_epochs=3).fit(make(), batches())
    torch.compiler.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ran[-1][0] == ran[-5][0], "one graph from the first batch after the cut on"
    assert [after[1] - before[1] for before, after in pairwise(ran[-6:])] == [1] * 5


@pytest.mark.parametrize("refit", [None, "cut"])
@pytest.mark.filterwarnings("ignore:The calibration batches are few")
def test_with_a_weight_of_nothing_the_run_is_bit_for_bit_that_without(train, refit):
    """Batch norm, dropout, logs, names, the inputs that the step sees, and a second calibration."""
    ends = []
    for weight in (None, 1e-40):
        trainer, _, compression = train(distill=weight, epochs=[1, 2], ratios=[0.6, 0.4], max_epochs=3, refit=refit)
        module = trainer.lightning_module
        ends.append((module.state_dict(), torch.get_rng_state(), trainer.callback_metrics["seen"]))
        hooks = [one for each in module.modules() for one in (each._forward_hooks, each._forward_pre_hooks)]
        assert not any(hooks) and "training_step" not in vars(module)
        assert (compression.state_dict()["teacher"] is None) == (weight is None)
    (first, state, seen), (other, other_state, other_seen) = ends
    assert same(first, other)
    assert torch.equal(state, other_state)
    assert seen == other_seen


@pytest.mark.situation("Repair", "a run with distillation that is resumed at any moment", "works")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_is_resumed_has_the_same_teacher_and_the_same_end(train, tmp_path, new_trainer):
    def plain():
        return Network(dropout=0.0)

    options = {"epochs": [1, 3], "ratios": [0.6, 0.4], "max_epochs": 4}
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, noted, _ = train(plain(), callbacks=[files], enable_checkpointing=True, **options)
    for epoch in (0, 1, 2):
        resumed, again, _ = train(plain(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert same(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict())
        assert same(again.teachers[-1], noted.teachers[-1])
        assert again.losses == noted.losses[3 * (epoch + 1) :]


def test_a_run_that_goes_on_in_the_same_process_has_the_same_teacher(train):
    trainer, noted, _ = train()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, batches())
    assert len(noted.teachers) == 9 and same(noted.teachers[-1], noted.teachers[3])


class Particular(Network):
    """Keeps what is no tensor in its files, leaves a part out of them, and has a hook that cannot be copied."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.part = nn.Linear(2, 2)

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}

    def state_dict(self, *arguments, **named):
        state = super().state_dict(*arguments, **named)
        return {name: one for name, one in state.items() if not name.startswith("part")}

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)

    def on_fit_start(self):
        self.head.register_forward_hook(Holder(self.trainer).see)


class Holder:
    def __init__(self, trainer):
        self.trainer, self.uncopied, self.seen = trainer, (one for one in ()), 0

    def see(self, layer, inputs, output):
        self.seen += 1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_a_module_has_beside_its_weights_is_no_hindrance(new_trainer, tmp_path):
    ends = []
    for path in (None, tmp_path / "half.ckpt"):
        torch.manual_seed(1)
        compression = LowRankCompression(0.5, 1, distill=0.5, show_table=False)
        module = Particular()
        epochs = (3,) if path else (2, 3)
        for last in epochs:
            trainer = new_trainer(tmp_path, compression, max_epochs=last)
            trainer.fit(module, batches(), ckpt_path=path if path or last == 2 else tmp_path / "half.ckpt")
            if last == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                teacher = compression.state_dict()["teacher"]
                assert "part.weight" in teacher and not any("extra" in name for name in teacher)
        ends.append(module.state_dict())
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items() if torch.is_tensor(one))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_teacher_of_another_network_is_refused(train, tmp_path):
    trainer, _, compression = train()
    compression._distilling.written = {
        name: one for name, one in compression._distilling.written.items() if name != "head.bias"
    }
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(
        MisconfigurationException, match=r"the entries and shapes of this one, they differ at head\.bias"
    ):
        train(ckpt_path=tmp_path / "other.ckpt", max_epochs=3)


@pytest.mark.situation("Repair", "distillation beside an average of the weights", "works")
def test_averages_go_on_beside_a_teacher(new_trainer, tmp_path):
    compression = LowRankCompression(0.5, 1, distill=0.5, show_table=False)
    average = EMAWeightAveraging(decay=0.5)
    trainer = new_trainer(tmp_path, average, compression, max_epochs=3)
    trainer.fit(Network(), batches())
    assert trainer.callback_metrics[LOGGED] > 0
    assert "head.weight" in compression.state_dict()["teacher"]


@pytest.mark.situation("Repair", "distillation of a run that was compressed without", "refused")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_without_a_teacher_a_compressed_run_is_not_gone_on_with(train, tmp_path):
    trainer, _, _ = train(distill=None)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(MisconfigurationException, match=r"from .*cut.ckpt was compressed without keeping it. Go on wi"):
        train(ckpt_path=tmp_path / "cut.ckpt", max_epochs=3)
    train(distill=None, ckpt_path=tmp_path / "cut.ckpt", max_epochs=3)


def test_a_cut_that_fails_leaves_no_teacher(tmp_path, new_trainer):
    seen = []

    class Full(CSVLogger):
        def log_metrics(self, metrics, step):
            if "compression/worst_error" in metrics:
                seen.append(compression.state_dict()["teacher"])
                raise OSError("the disk is full")

    compression = LowRankCompression(0.5, 1, distill=0.5, show_table=False)
    module = Network()
    with pytest.raises(OSError, match="the disk is full"):
        new_trainer(tmp_path, compression, max_epochs=2, logger=Full(tmp_path)).fit(module, batches())
    assert len(seen) == 1 and "head.weight" in seen[0]
    assert compression.state_dict()["teacher"] is None and "training_step" not in vars(module)


class Parts(Network):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(torch.relu(self.body(batch[0])).flatten(1)), batch[1])


class Silent(Network):
    def training_step(self, batch, batch_idx):
        return self.head.weight.sum()


class Untrained(Network):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            scores = self(batch[0])
        return scores.mean() + self.head.bias.sum()


class Gives(Network):
    """Gives something that is no class scores."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(super().forward(images))

    def training_step(self, batch, batch_idx):
        found = self(batch[0])
        return (found if torch.is_tensor(found) else found["scores"]).float().mean()


class Manual(Network):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


REFUSED = {
    "parts": (Parts, r"must call its network once, it called body, head. Call all parts from one `forward`"),
    "nothing": (Silent, r"must call its network once, it called no module with parameters"),
    "no gradient": (Untrained, r"through the scores of Untrained, and they have no gradient"),
    "a dict": (lambda: Gives(lambda one: {"scores": one}), r"it returned dict\. Let the `forward`"),
    "one class": (lambda: Gives(lambda one: one[:, :1]), r"it returned a tensor of \(16, 1\), torch.float32\. Let"),
    "a vector": (lambda: Gives(lambda one: one[:, 0]), r"it returned a tensor of \(16,\), torch"),
    "three axes": (lambda: Gives(lambda one: one.unsqueeze(1)), r"\(16, 1, 4\), torch.float32\. Of three axes it cann"),
    "whole numbers": (lambda: Gives(lambda one: one.long()), r"it returned a tensor of \(16, 4\), torch.int64"),
    "manual optimization": (Manual, r"this module steps its optimizers itself .* Let Lightning optimize, or set dist"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.situation("Repair", f"distillation: {case}", "refused")) for case in REFUSED],
)
def test_what_cannot_be_distilled_is_refused_before_anything_is_trained(train, case):
    make, text = REFUSED[case]
    module = make()
    before = {name: one.clone() for name, one in module.named_parameters()}
    with pytest.raises((MisconfigurationException, ValueError), match=rf"(?s)LowRankCompression: .*{text}"):
        train(module, epochs=3, max_epochs=4)
    assert same(dict(module.named_parameters()), before)
    assert "training_step" not in vars(module)


class Holds(Network):
    """Calls a layer past the attributes of the module."""

    def __init__(self):
        super().__init__()
        head = self.head
        self.forward = lambda images: head(images.flatten(1)[:, :108].repeat(1, 3)[:, :256])


def test_a_copy_that_runs_the_networks_own_weights_is_refused(train):
    with pytest.raises(MisconfigurationException, match="does not come from its own weights alone"):
        train(Holds(), epochs=0, max_epochs=1, method=ALDS(), refit=None)


def test_a_module_that_cannot_be_copied_is_refused(tmp_path, new_trainer):
    class Keeps(Network):
        def training_step(self, batch, batch_idx):
            self.kept = super().training_step(batch, batch_idx)
            return self.kept

    compression = LowRankCompression(0.5, 1, method=ALDS(), refit=None, distill=0.5, show_table=False)
    with pytest.raises(MisconfigurationException, match=r"it could not be copied \(RuntimeError: Only Tensors created"):
        new_trainer(tmp_path, compression, max_epochs=2).fit(Keeps(), batches())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"distill": 0}, r"`distill` must be a weight in \(0, 1\] or None, got 0\."),
        ({"distill": 1.5}, r"`distill` must be a weight in \(0, 1\] or None, got 1.5"),
        ({"distill": True}, r"`distill` must be a weight in \(0, 1\] or None, got True"),
        ({"distill": "half"}, r"`distill` must be a weight in \(0, 1\] or None, got 'half'"),
        ({"distill": float("nan")}, r"`distill` must be a weight"),
        ({"distill_temperature": 0}, r"`distill_temperature` must be a number above 0, got 0\."),
        ({"distill_temperature": float("inf")}, r"`distill_temperature` must be a number above 0, got inf"),
        ({"distill_temperature": "warm"}, r"`distill_temperature` must be a number above 0, got 'warm'"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        LowRankCompression(0.5, 1, **options)


class Tagger(LightningModule):
    """A token classifier of transformers, whose outputs are a mapping with the loss and the scores of each token."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = transformers.BertForTokenClassification(
            transformers.BertConfig(
                **sizes, vocab_size=50, num_labels=5, max_position_embeddings=16, initializer_range=0.5, **still
            )
        )

    def training_step(self, batch, batch_idx):
        return self.bert(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.situation("Repair", "distillation of a network of transformers", "works")
def test_scores_in_the_outputs_of_transformers_are_distilled(tmp_path, new_trainer):
    tokens = torch.randint(0, 50, (32, 12), generator=torch.Generator().manual_seed(0))
    compression = LowRankCompression(0.6, 1, distill=0.5, distill_temperature=2.0, show_table=False)
    noted, module = Noted(compression), Tagger()
    trainer = new_trainer(tmp_path, compression, noted, max_epochs=2)
    trainer.fit(module, DataLoader(TensorDataset(tokens, tokens % 5), batch_size=32))
    with torch.no_grad():
        own, wanted = (one.eval().bert(input_ids=tokens).logits.flatten(0, 1) for one in (module, noted.dense[0]))
    expected = float(distillation_loss(own, wanted, 2.0))
    assert float(trainer.callback_metrics["compression/distillation_loss"]) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4
