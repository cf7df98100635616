"""The callback inside a real Trainer: when it compresses, what follows the model, what a person sees of it."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.flop_counter import FlopCounterMode

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression
from lr_callback.decisions.costs import COUNTED

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ["network.0", "network.3", "network.8", "network.10"]
TITLE = "Low-rank compression at the start of epoch"


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def factorized_in(module):
    return [name for name, one in module.named_modules() if isinstance(one, lrc.layers.FactorizedLayer)]


def counted(module, images):
    """Return the multiply-adds of one call, by torch's own counter."""
    module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return counter.get_total_flops() // 2


EVENTS = {
    "int": (0.5, 1, {1: 0.5}),
    "list of one": ([0.4], [2], {2: 0.4}),
    "one ratio for two": (0.4, [1, 3], {1: 0.4, 3: 0.4}),
    "each its own": ([0.6, 0.3], [1, 2], {1: 0.6, 2: 0.3}),
    "listed late first": ([0.3, 0.6], [2, 1], {1: 0.6, 2: 0.3}),
    "the later one larger": ([0.3, 0.6], [1, 3], {1: 0.3, 3: 0.6}),
    "epoch 0": (0.5, 0, {0: 0.5}),
}


@pytest.mark.parametrize(("keep_ratio", "epochs", "expected"), EVENTS.values(), ids=EVENTS)
def test_model_is_factorized_at_the_start_of_each_named_epoch(fit, new_module, new_watch, keep_ratio, epochs, expected):
    module, watch = new_module(), new_watch()
    dense = kept = parameters_of(module)
    fit(module, LowRankCompression(keep_ratio, epochs), watch, max_epochs=4)
    for epoch in range(4):
        if epoch in expected:
            kept = watch.first(epoch)
            assert kept <= expected[epoch] * dense
        assert {watch.parameters[epoch, moment] for moment in (0, 1, 2, 3, "end")} == {kept}
    assert parameters_of(module) == kept


def test_fast_dev_run_compresses_at_once(fit, new_module, new_watch):
    module, watch = new_module(), new_watch()
    dense = parameters_of(module)
    fit(module, LowRankCompression(0.3, epochs=[10, 20]), watch, fast_dev_run=True)
    assert watch.first(0) <= 0.3 * dense
    assert list(watch.parameters) == [(0, 0), (0, "end")]


class Keep(Callback):
    """Keep a copy of the network as it is when an epoch starts."""

    def __init__(self):
        self.copies = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.copies[trainer.current_epoch] = nn.ModuleDict({"network": copy.deepcopy(pl_module.network)})


def test_later_event_composes_back_and_allocates_anew(fit, new_module):
    module, before = new_module(), Keep()
    dense = parameters_of(module)
    compression = LowRankCompression([0.5, 0.3], [1, 2], method=ALDS(), refit=None)
    fit(module, before, compression, max_epochs=3)
    composed = before.copies[2]
    assert factorized_in(composed)
    assert lrc.densify_(composed).parameters_after == dense
    expected = lrc.allocate(composed, 0.3)
    assert compression.allocation.dense_cost == dense
    for name, layer in expected.factorized.items():
        found = compression.allocation.layers[name]
        assert (found.folding, found.num_slices, found.rank) == (layer.folding, layer.num_slices, layer.rank)
        assert found.relative_error == pytest.approx(layer.relative_error, rel=1e-4)
    assert list(compression.allocation.factorized) == list(expected.factorized) == factorized_in(module)


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.05), lambda p: Adam(p, lr=0.01)], ids=["sgd", "adam"])
def test_parameters_train_after_the_cut_and_the_optimizer_holds_exactly_those(fit, new_module, new_watch, optimizer):
    module, watch = new_module(lambda one: optimizer(one.parameters())), new_watch()
    fit(module, LowRankCompression(0.4, 1), watch, max_epochs=6)
    trained, cut = dict(module.named_parameters()), watch.first_weights[1]
    assert any(name.endswith("encoder.weight") for name in trained)
    # A bias before BatchNorm is taken off again: its gradient is rounding.
    rest = [name for name, value in trained.items() if torch.equal(value, cut[name])]
    assert set(rest) <= {"network.0.bias", "network.3.bias", "network.3.decoder.bias"}
    assert all(map(math.isfinite, watch.losses))
    assert watch.losses[-1] < watch.losses[4]
    assert watch.strangers == []


def scheduled(make, **how):
    def optimize(module):
        norms, others = [], []
        for name, parameter in module.named_parameters():
            (norms if name.endswith("bias") else others).append(parameter)
        optimizer = SGD([{"params": norms, "lr": 0.1}, {"params": others}], lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **how}}

    return optimize


SCHEDULES = {
    "step": scheduled(lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5)),
    "cosine": scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 4)),
    "lambda": scheduled(lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (1 + e)])),
    "one cycle": scheduled(lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=16), interval="step"),
    "cyclic": scheduled(lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3), interval="step"),
    "plateau": scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0), monitor="constant"),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rates_are_those_of_a_run_without_the_callback(fit, new_module, new_watch, schedule):
    alone, compressed = new_watch(), new_watch()
    fit(new_module(schedule), alone, max_epochs=4)
    # What a plateau is measured against begins anew with the other monitors, unless they keep theirs.
    compression = LowRankCompression([0.6, 0.4], [1, 3], reset_monitors=schedule is not SCHEDULES["plateau"])
    fit(new_module(schedule), compression, compressed, max_epochs=4)
    assert len({tuple(rates) for rates in alone.rates}) > 1
    assert compressed.rates == alone.rates
    assert compressed.first(3) < compressed.first(0) == alone.first(3)


@pytest.mark.parametrize("epoch", [0, 1])
def test_metrics_are_logged_and_equal_numbers_recomputed_from_the_model(
    fit, loader, new_module, tmp_path, epoch, read_metrics
):
    dense, module = new_module(), new_module()
    compression = LowRankCompression(0.4, epoch)
    trainer = fit(module, compression, logger=CSVLogger(tmp_path))
    images = next(iter(loader()))[0]
    errors = [layer.relative_error for layer in compression.allocation.factorized.values()]
    expected = {
        "compression/kept_parameters": parameters_of(module) / parameters_of(dense),
        "compression/kept_multiply_adds": counted(module, images) / counted(dense, images),
        "compression/worst_error": max(errors),
        "compression/mean_error": sum(errors) / len(LAYERS),
        "compression/layers_factorized": len(factorized_in(module)),
    }
    written = read_metrics(trainer.logger.log_dir)
    for name, value in expected.items():
        # What is counted on the first batch, after a compression in epoch 0, stands at that batch's step.
        assert written[name] == {4 * epoch: pytest.approx(value, rel=1e-6)}
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-6)
    assert 0 < written["compression/seconds"][4 * epoch] < 60


def test_table_is_a_message_where_there_is_no_bar(fit, new_module, messages, capsys):
    fit(new_module(), LowRankCompression(0.4, 1))
    tables = [text for text in messages if TITLE in text]
    assert len(tables) == 1
    assert tables[0].startswith(f"{TITLE} 1\n")
    assert all(f"\n{name} " in tables[0] for name in LAYERS)
    assert "kept, 40.0% asked" in tables[0]
    assert TITLE not in capsys.readouterr().out


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_table_is_printed_once_above_a_progress_bar(fit, new_module, messages, capsys, bar):
    pytest.importorskip("rich")
    compression = LowRankCompression(0.4, 1)
    fit(new_module(), compression, bar(), enable_progress_bar=True)
    printed = capsys.readouterr().out
    assert printed.count(f"{TITLE} 1") == 1
    assert all(line in printed for line in str(compression.allocation).splitlines())
    assert [text for text in messages if TITLE in text] == []


def test_table_is_left_out_on_request(fit, new_module, messages, capsys):
    compression = LowRankCompression(0.4, 1, show_table=False)
    fit(new_module(), compression)
    assert compression.allocation is not None
    assert TITLE not in "".join([*messages, *capsys.readouterr()])


class WhenLearned(LowRankCompression):
    """Compress once the training loss of an epoch is low, a moment that no list of epochs can name."""

    def should_compress(self, trainer, pl_module):
        loss = trainer.callback_metrics.get("train_loss")
        return 0.4 if loss is not None and loss < 1.5 and self.allocation is None else None


def test_should_compress_can_be_overridden(fit, new_module, new_watch):
    module, watch, compression = new_module(), new_watch(), WhenLearned(epochs=0)
    dense = parameters_of(module)
    fit(module, compression, watch, max_epochs=6)
    low = next(epoch for epoch in range(6) if watch.losses[4 * epoch + 3] < 1.5)
    assert 0 <= low < 5
    assert watch.first(low) == dense
    assert watch.first(low + 1) <= 0.4 * dense


def test_snapshots_hold_the_weights_of_their_moments(fit, new_module, new_watch, tmp_path):
    module, before, after = new_module(), Keep(), new_watch()
    compression = LowRankCompression([0.6, 0.4], [1, 2], snapshots=True)
    fit(module, before, compression, after, max_epochs=4)
    folder = tmp_path / "compression"
    assert compression.snapshot_files == {name: str(folder / f"{name}.ckpt") for name in ("dense", "cut", "final")}
    moments = {"dense": before.copies[1].state_dict(), "cut": after.first_weights[2], "final": module.state_dict()}
    for name, expected in moments.items():
        written = torch.load(compression.snapshot_files[name], weights_only=True)
        assert "optimizer_states" not in written
        assert written["state_dict"].keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in written["state_dict"].items())


def test_no_event_writes_no_snapshot(fit, new_module, tmp_path):
    with pytest.warns(UserWarning, match="never reached"):
        fit(new_module(), LowRankCompression(0.5, 9, snapshots=True))
    assert list(tmp_path.iterdir()) == []


def test_second_fit_of_the_same_trainer_goes_on(fit, loader, new_module, new_watch):
    module, watch = new_module(), new_watch()
    trainer = fit(module, LowRankCompression([0.5, 0.3], [1, 3]), watch, max_epochs=4)
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, loader(), loader())
    assert watch.first(1) > watch.first(3) == watch.first(5) == parameters_of(module)


def test_second_run_with_the_same_callback_is_a_run_of_its_own(fit, loader, new_module, new_watch, tmp_path):
    compression, watch = LowRankCompression(0.4, 1, snapshots=True), new_watch()
    fit(new_module(), compression, default_root_dir=tmp_path / "first")
    other = new_module()
    other.network.insert(8, nn.Linear(256, 256))
    fit(other, compression, watch, default_root_dir=tmp_path / "second", logger=CSVLogger(tmp_path / "second"))
    assert watch.first(1) <= 0.4 * watch.first(0)
    assert {"first" in path for path in compression.snapshot_files.values()} == {False}
    assert sorted(compression.snapshot_files) == ["cut", "dense", "final"]


def test_multiply_adds_of_the_first_batch_are_kept_within_their_budget(fit, loader, new_module):
    images = next(iter(loader()))[0]
    dense, module, compression = new_module(), new_module(), LowRankCompression(0.5, 1, cost="multiply_adds")
    fit(module, compression)
    assert compression.allocation.cost == counted(module, images)
    assert compression.allocation.dense_cost == counted(dense, images)
    assert 0.4 < counted(module, images) / counted(dense, images) <= 0.5


def test_multiply_adds_at_epoch_0_are_counted_on_the_example_input(fit, new_module):
    module, example = new_module(), torch.zeros(2, 1, 8, 8)
    module.example_input_array = example
    dense = counted(new_module(), example)
    fit(module, LowRankCompression(0.5, 0, cost="multiply_adds"))
    assert 0.4 < counted(module, example) / dense <= 0.5


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        ({"include": ["network.8"]}, {"network.8"}),
        ({"exclude": ["network.8", "*.10"]}, {"network.0", "network.3"}),
        ({"include": ["*.[38]"], "exclude": ["network.3"]}, {"network.8"}),
    ],
)
def test_only_the_chosen_layers_are_factorized(fit, new_module, patterns, allowed):
    module, compression = new_module(), LowRankCompression(0.9, 1, **patterns)
    fit(module, compression)
    assert factorized_in(module)
    assert set(factorized_in(module)) <= allowed == set(compression.allocation.layers)


@pytest.mark.parametrize("cost", COUNTED)
def test_run_without_an_event_is_bitwise_the_same_as_without_the_callback(fit, new_module, cost):
    runs = []
    for compression in ([], [LowRankCompression(0.5, 9, cost=cost)]):
        torch.manual_seed(3)
        module = new_module(dropout=0.3)
        if compression:
            with pytest.warns(UserWarning, match="never reached"):
                trainer = fit(module, *compression, shuffle=True)
            assert compression[0]._counting.observation.dense_multiply_adds > 0  # the first batch was looked at
        else:
            trainer = fit(module, shuffle=True)
        runs.append((module.state_dict(), trainer.optimizers[0].state_dict()["state"], torch.get_rng_state()))
    alone, watched = runs
    assert all(torch.equal(value, watched[0][name]) for name, value in alone[0].items())
    assert all(torch.equal(one["momentum_buffer"], watched[1][i]["momentum_buffer"]) for i, one in alone[1].items())
    assert torch.equal(alone[2], watched[2])
