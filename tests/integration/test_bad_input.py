"""What cannot work is refused early, with the reason and the way out, and leaves everything as it was."""

import re
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("keep_ratio", [0, 0.0, -0.1, 1.0001, 30, float("nan"), float("inf"), "0.5", True, {}])
def test_keep_ratio_must_be_a_number_above_0_and_at_most_1(keep_ratio):
    with pytest.raises(ValueError, match=r"`keep_ratio` must be a number in \(0, 1\].*got") as refusal:
        LowRankCompression(keep_ratio)
    assert repr(keep_ratio) in str(refusal.value)


@pytest.mark.parametrize("ratios", [[0.5, 0], [0.5, "0.3"], (None, 0.5)])
def test_each_keep_ratio_of_a_list_must_be_in_range(ratios):
    with pytest.raises(ValueError, match=r"`keep_ratio` must be a number in \(0, 1\]"):
        LowRankCompression(ratios, [1, 2])


@pytest.mark.parametrize(
    ("ratios", "epochs"), [([0.5, 0.3], 1), ([0.5, 0.3], [1]), ([0.5], [1, 2]), ([], [1]), ([0.5, 0.4, 0.3], [1, 2])]
)
def test_list_of_ratios_must_have_one_for_each_epoch(ratios, epochs):
    count = len(epochs) if isinstance(epochs, list) else 1
    with pytest.raises(ValueError, match=rf"one for each of the {count} `epochs` .*got {len(ratios)}: "):
        LowRankCompression(ratios, epochs)


@pytest.mark.parametrize("epoch", [-1, 1.0, 2.5, "1", None, True])
@pytest.mark.parametrize("listed", [False, True])
def test_epochs_must_be_whole_numbers_from_0(epoch, listed):
    with pytest.raises(ValueError, match=rf"`epochs` must be whole numbers from 0, got {epoch!r}\."):
        LowRankCompression(0.5, [3, epoch] if listed else epoch)


@pytest.mark.parametrize("epochs", [[], [2, 2], [1, 3, 1]])
def test_epochs_must_name_one_and_none_twice(epochs):
    with pytest.raises(ValueError, match=r"`epochs` must name at least one epoch and none twice, got \["):
        LowRankCompression(0.5, epochs)


def test_unknown_cost_names_the_known_ones():
    units = r"\['parameters', 'multiply_adds', 'bytes', 'latency', 'activation_memory'\], or a function of a module"
    with pytest.raises(ValueError, match=f"`cost` must be one of {units}, got 'flops'"):
        LowRankCompression(cost="flops")


@pytest.mark.parametrize(("epochs", "late"), [(3, [3]), ([1, 3, 8], [3, 8])])
def test_epochs_beyond_the_run_are_named_in_a_warning(fit, new_module, epochs, late):
    with pytest.warns(UserWarning, match=rf"epochs \[{', '.join(map(str, late))}\] are never reached, max_epochs is 3"):
        fit(new_module(), LowRankCompression(0.5, epochs), max_epochs=3)


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 5}, {"fast_dev_run": True}])
def test_epochs_that_may_be_reached_are_not_warned_of(fit, new_module, settings):
    fit(new_module(), LowRankCompression(0.5, [1]), **settings)  # a warning is an error in these tests


class Steps(Callback):
    """Count training steps, and remember the error that ended the run."""

    def __init__(self):
        self.count = 0
        self.error = None

    def on_train_batch_start(self, *_):
        self.count += 1

    def on_exception(self, trainer, pl_module, exception):
        self.error = exception


def refused(fit, module, compression, error, match):
    """Train; return the number of training steps before the refusal, which left the module as it was built."""
    steps, before = Steps(), {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match) as refusal:
        fit(module, compression, steps)
    assert steps.error is refusal.value
    assert module.state_dict().keys() == before.keys()
    if steps.count == 0:
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return steps.count


@pytest.mark.parametrize("ratios", [0.01, [0.5, 0.02]])
def test_budget_out_of_reach_is_refused_before_the_first_step_with_the_range(fit, new_module, ratios):
    module = new_module()
    low = lrc.analyze(module).reachable[0]
    match = r"at least [\d,]+ parameters, got [\d,]+ parameters\..* " + rf"Reachable: keep_ratio from {low:.4f} to 1\."
    assert refused(fit, module, LowRankCompression(ratios, [1, 2]), ValueError, match) == 0


@pytest.mark.parametrize("epoch", [0, 2])
def test_budget_in_multiply_adds_out_of_reach_is_refused_before_the_first_step_without_an_example(
    fit, new_module, epoch
):
    compression = LowRankCompression(0.001, epoch, cost="multiply_adds")
    assert refused(fit, new_module(), compression, ValueError, r"at least [\d,]+ multiply-adds, got") == 0


def only_trained(new_module):
    """Return a module whose step cannot be run before the training."""

    class OnlyTrained(new_module):
        def training_step(self, batch, batch_idx):
            if not self.training:
                raise RuntimeError("no eval mode")
            return super().training_step(batch, batch_idx)

    return OnlyTrained()


def test_without_an_example_and_a_batch_beforehand_it_is_refused_after_the_first_one(fit, new_module):
    compression = LowRankCompression(0.001, 2, cost="multiply_adds", method=ALDS(), refit=None)
    match = r"at least [\d,]+ multiply-adds, got"
    assert refused(fit, only_trained(new_module), compression, ValueError, match) == 1


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({"multiply_adds": 0.001}, r"at least [\d,]+ multiply-adds, got"),
        ({"parameters": 0.9, "multiply_adds": 0.001}, r"`budget`: 0\.9 of parameters, 0\.001 of multiply-adds: "),
        (
            {"parameters": 0.3, "activation_memory": 0.5},
            r"the activation memory that is not in these layers is more",
        ),
    ],
)
def test_budget_out_of_reach_on_an_example_is_refused_before_the_first_step(fit, new_module, epoch, budget, match):
    module = new_module()
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    compression = LowRankCompression(epochs=epoch, budget=budget, method=ALDS())
    assert refused(fit, module, compression, ValueError, match) == 0


@pytest.mark.parametrize("cost", ["multiply_adds", "latency"])
def test_an_example_that_the_module_does_not_take_is_refused_before_the_first_step(fit, new_module, cost):
    module = new_module()
    module.example_input_array = torch.zeros(1, 3, 8, 8)
    match = (
        r"`example_input_array`: \w+ must run on it in eval mode without gradients, and raised RuntimeError: .*; give "
        r"what its forward takes, or keep parameters or bytes, which need no run\. Nothing was changed\."
    )
    assert refused(fit, module, LowRankCompression(0.5, 2, cost=cost), ValueError, match) == 0


def test_calls_that_cannot_be_made_again_are_told_of_where_they_are_needed(fit, new_module):
    class OnlyTrained(nn.Module):
        def forward(self, inputs):
            if not self.training:
                raise NotImplementedError("no eval mode")
            return inputs

    module = new_module()
    module.network.insert(0, OnlyTrained())
    match = (
        r"the network's calls of the first batch must be possible again in eval mode without gradients, and raised "
        r"NotImplementedError: no eval mode; let them run so, set the module's `example_input_array`, or keep"
    )
    assert refused(fit, module, LowRankCompression(0.5, 2, cost="multiply_adds"), ValueError, match) == 1


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_refused_before_the_first_step(fit, new_module, argument):
    compression = LowRankCompression(0.5, 2, **{argument: ["network.3", "encoder.*"]})
    match = (
        rf"`{argument}`: each pattern must match a layer's name, 'encoder\.\*' matches none of: network\.0, network\.3"
    )
    assert refused(fit, new_module(), compression, ValueError, match) == 0


def test_model_without_a_layer_to_factorize_is_refused_before_the_first_step(fit, new_module):
    module = new_module()
    module.network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    compression = LowRankCompression(0.5, 1, exclude=["network.2"])
    match = r"Nothing to factorize: .*Skipped: network\.2: named by `exclude`"
    assert refused(fit, module, compression, ValueError, match) == 0


class Break(Callback):
    """Put a NaN into a layer at the start of an epoch, as a diverging training does."""

    def __init__(self, name, epoch):
        self.name, self.epoch = name, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.get_submodule(self.name).weight.data.view(-1)[0] = float("nan")


def test_nan_at_the_event_ends_the_run_with_the_layer_named_and_nothing_changed(fit, new_module):
    module, steps = new_module(), Steps()
    compression = LowRankCompression(0.5, 1, method=ALDS(), refit=None, snapshots=True)
    match = r"network\.8: every weight must be finite, found 1 of 8192 NaN or infinite"
    modules = list(module.modules())
    with pytest.raises(ValueError, match=match):
        fit(module, Break("network.8", 1), compression, steps)
    assert isinstance(steps.error, ValueError)
    assert steps.count == 4
    assert list(module.modules()) == modules
    assert compression.allocation is None
    assert compression.state_dict()["applied"] == []
    assert all(not one._forward_hooks and not one._forward_pre_hooks for one in modules)


def test_error_in_the_first_batch_leaves_no_hooks_behind(fit, new_module):
    module = new_module()
    module.network.append(nn.Linear(7, 7))  # does not fit what comes before it
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(module, LowRankCompression(0.5, 1))
    assert all(not one._forward_hooks and not one._forward_pre_hooks for one in module.modules())


FIRST = pytest.mark.parametrize("settings", [{"max_epochs": 1}, {"fast_dev_run": True}])


@FIRST
def test_multiply_adds_in_the_first_epoch_are_of_a_batch_from_a_copy_of_the_loader(fit, new_module, settings):
    compression, steps = LowRankCompression(0.5, 0, cost="multiply_adds"), Steps()
    fit(new_module(), compression, steps, **settings)
    found = compression.allocation
    assert found.unit == "multiply_adds" and found.cost <= found.budget < found.dense_cost
    assert steps.count == (1 if "fast_dev_run" in settings else 4)


@FIRST
def test_multiply_adds_in_the_first_epoch_need_an_example_input_or_a_batch(fit, new_module, settings):
    compression = LowRankCompression(0.5, 0, cost="multiply_adds")
    match = (
        r"`example_input_array` is not set, and no batch could be had beforehand: the loader is a stream, or .*\. "
        r"Set it, or compress at epoch 1 or later\."
    )
    with pytest.raises(MisconfigurationException, match=match):
        fit(only_trained(new_module), compression, **settings)


class Stream(IterableDataset):
    """Goes on where it was, as what reads from a socket."""

    def __init__(self):
        self.left = iter([(torch.randn(1, 8, 8), place % 10) for place in range(64)])

    def __iter__(self):
        return self.left


class Ordered(Sampler):
    """Goes on where it was."""

    def __init__(self):
        self.left = iter(range(64))

    def __iter__(self):
        return self.left


IMAGES = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(), batch_size=16),
        lambda: DataLoader(IMAGES, batch_size=16, sampler=Ordered()),
        lambda: DataLoader(IMAGES, batch_sampler=BatchSampler(Ordered(), 16, drop_last=False)),
    ],
    ids=["stream", "sampler", "sampler of batches"],
)
def test_of_a_stream_no_batch_is_lost(new_trainer, new_module, loader, tmp_path, make):
    compression, steps = LowRankCompression(0.5, 1, cost="multiply_adds", method=ALDS(), refit=None), Steps()
    trainer = new_trainer(tmp_path, compression, steps, max_epochs=2)
    trainer.fit(new_module(), make(), loader())
    assert steps.count == 4
    assert compression.allocation.unit == "multiply_adds"


def test_two_of_these_callbacks_in_one_trainer_are_refused_by_lightning():
    twice = [LowRankCompression(0.5, 1), LowRankCompression(0.3, 2)]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LowRankCompression`"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=twice)


class Early(LowRankCompression):
    """One that Lightning takes for another callback."""


def test_two_of_these_callbacks_of_different_classes_are_refused(fit, new_module):
    compression = [Early(0.5, 1), LowRankCompression(0.3, 2)]
    match = r"the Trainer must have one of these callbacks, found Early, LowRankCompression\. .*give one of them lists"
    with pytest.raises(MisconfigurationException, match=match):
        fit(new_module(), *compression)


@pytest.mark.situation("Checkpoints", "resuming from a file of weights alone", "refused")
@pytest.mark.parametrize("epochs", [1, 3], ids=["of after the cut", "of before the cut"])
def test_file_of_weights_alone_is_refused_with_the_way_out(tmp_path, fit, new_module, new_trainer, loader, epochs):
    first = fit(new_module(), LowRankCompression(0.5, epochs), max_epochs=4)
    path = tmp_path / "weights.ckpt"
    first.save_checkpoint(path, weights_only=True)
    steps = Steps()
    again = new_trainer(tmp_path, LowRankCompression(0.5, epochs), steps, max_epochs=5)
    match = r"weights\.ckpt lacks optimizer_states, lr_schedulers, .*load_from_checkpoint\(cls, path\)` or .*restore_"
    with pytest.raises(MisconfigurationException, match=match):
        again.fit(new_module(), loader(), loader(), ckpt_path=path)
    assert steps.count == 0


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, [None], {"a": 1}, ["layer", 2]], ids=str)
def test_what_is_no_pattern_is_refused_by_name(argument, value):
    with pytest.raises(
        TypeError, match=rf"`{argument}` must be a glob pattern of layer names such as 'layer1\.\*', or a"
    ):
        LowRankCompression(**{argument: value})


@pytest.mark.parametrize("argument", ["figures", "show_table", "snapshots", "reset_monitors", "learning_rate_rewind"])
def test_what_is_neither_true_nor_false_is_refused_by_name(argument):
    with pytest.raises(TypeError, match=f"`{argument}` must be True or False, got 'no'"):
        LowRankCompression(**{argument: "no"})


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"cost": "multiply_adds"}, "multiply-adds"),
        ({"budget": {"parameters": 0.9, "activation_memory": 3.0}}, "bytes of activation memory"),
        ({"cost": lambda module: sum(one.numel() for one in module.parameters())}, r"\S+"),
    ],
)
def test_what_can_be_reached_is_told_in_the_unit_of_each_budget_before_the_first_step(
    fit, new_module, messages, options, unit
):
    module = new_module()
    module.example_input_array = torch.zeros(4, 1, 8, 8)

    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        fit(module, LowRankCompression(epochs=2, **options), Stop())
    (told,) = [line for line in messages if line.startswith("Low-rank compression can go down to")]
    assert re.search(rf"[\d.]+ % of [\d,.]+ {unit}", " ".join(told.split()))
    told = " ".join(told.split())
    assert re.search(r"[\d.]+ % of [\d,]+ multiply-adds", told), "the example was run"
    assert ("activation memory falls below the dense" in told.lower()) == ("activation_memory" not in str(options))
    assert told.lower().endswith("time is measured for a budget in latency.")


def test_without_an_example_it_is_told_why_costs_of_a_run_have_no_range(fit, new_module, messages):
    fit(new_module(), LowRankCompression(0.5, epochs=1))
    (told,) = [line for line in messages if line.startswith("Low-rank compression can go down to")]
    ranges, reasons = " ".join(told.split()).split(" bytes. ")
    assert " parameters, " in ranges and "multiply-adds" not in ranges
    assert reasons == (
        "Multiply-adds are known of a network that runs on its `example_input_array`; activation memory falls below "
        "the dense network's only where autocast copies weights; time is measured for a budget in latency."
    )


def test_a_budget_that_cannot_be_met_is_named_as_it_was_given_also_where_another_waits_for_a_batch(fit, new_module):
    compression = LowRankCompression(epochs=1, budget={"parameters": 0.001, "multiply_adds": 0.5})
    with pytest.raises(ValueError, match=r"`budget`: 0.001 of parameters: .* Reachable: a fraction from 0\.\d+ to 1\."):
        fit(new_module(), compression)
    assert compression.allocation is None


class Looks(LightningModule):
    """Multiplies nothing: it looks up, and adds."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 32)

    def training_step(self, batch, _):
        return self.table(batch[0].flatten(1).long() % 64).mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_network_without_a_multiplication_is_compressed_and_nothing_is_said_of_these(fit, tmp_path):
    options = {"method": ALDS(), "embeddings": True, "refit": None}
    compression, logger = LowRankCompression(0.5, epochs=1, **options), CSVLogger(tmp_path)
    fit(Looks(), compression, logger=logger)
    assert set(compression.allocation.factorized) == {"table"}
    logged = (Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8")
    assert "compression/kept_parameters" in logged and "kept_multiply_adds" not in logged


class TwoParts(LightningModule):
    """Trains an encoder and a decoder; its forward is another part of it."""

    def __init__(self, forward, example):
        super().__init__()
        self.encoder, self.decoder, self.small = nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(8, 1)
        self.example_input_array, self.part = example, forward

    def forward(self, inputs):
        return getattr(self, self.part)(inputs) if self.part else inputs @ self.encoder.weight

    def training_step(self, batch, _):
        images = batch[0].flatten(1)
        return (self.decoder(self.encoder(images)) - images).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Both(TwoParts):
    """Calls its encoder and its decoder, and reads the decoder's weight besides."""

    def __init__(self, example):
        super().__init__("", example)

    def forward(self, inputs):
        return self.decoder(self.encoder(inputs)) @ self.decoder.weight


def test_an_override_that_is_out_of_range_in_a_unit_that_is_not_asked_for_ends_nothing(fit):
    compression = LowRankCompression(0.6, epochs=1, method=ALDS(), refit=None, overrides={"encoder": {"rank": 4}})
    fit(TwoParts("decoder", torch.zeros(4, 32)), compression)
    assert compression.allocation.layers["encoder"].rank == 4


def test_a_run_goes_on_from_a_checkpoint_with_a_layer_that_costs_nothing_in_the_first_unit(
    fit, tmp_path, loader, new_trainer
):
    options = {"budget": {"multiply_adds": 0.9, "parameters": 0.4}, "method": ALDS(), "refit": None}
    first, second = (LowRankCompression(epochs=1, **options) for _ in range(2))
    trainer = fit(TwoParts("decoder", torch.zeros(4, 32)), first)
    assert first.allocation.layers["encoder"].kept is None
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    again = new_trainer(tmp_path, second, max_epochs=4)
    again.fit(TwoParts("decoder", torch.zeros(4, 32)), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert second.allocation == first.allocation


@pytest.mark.parametrize(
    ("forward", "example", "multiply_adds"),
    [
        ("small", torch.zeros(4, 8), "100.0 % of 32 multiply-adds"),
        ("decoder", torch.zeros(4, 32), r"[4-6]\.\d % of 8,192 multiply-adds"),
        ("", torch.zeros(4, 32), "100.0 % of 8,192 multiply-adds"),
        ("small", torch.zeros(0, 8), None),
    ],
    ids=["too small", "a part", "a weight", "no sample"],
)
def test_an_example_of_a_part_of_the_network_decides_nothing(fit, messages, forward, example, multiply_adds):
    """Ranges are those of each unit alone, whatever another has to say of a layer."""
    module = TwoParts(forward, example)
    low = lrc.analyze(module).reachable[0]
    compression = LowRankCompression(0.4, epochs=1, refit=None)
    fit(module, compression)
    (told,) = [" ".join(line.split()) for line in messages if line.startswith("Low-rank compression can go down to")]
    assert f"can go down to {100 * low:.1f} % of " in told
    assert "multiply-adds" not in told if multiply_adds is None else re.search(multiply_adds, told)
    assert set(compression.allocation.factorized) == {"encoder", "decoder"}
    assert compression._counting.observation.dense_multiply_adds == 64 * 2 * 64 * 32, "of the first batch"


def test_ranges_of_several_budgets_are_those_of_each_alone(fit, messages):
    """Beside multiply-adds a layer whose weight is read stays dense; parameters alone could be fewer by it."""
    module = Both(torch.zeros(4, 64))
    low = lrc.analyze(module).reachable[0]
    fit(module, LowRankCompression(budget={"multiply_adds": 0.9, "parameters": 0.9}, epochs=1, refit=None))
    (told,) = [" ".join(line.split()) for line in messages if line.startswith("Low-rank compression can go down to")]
    assert f"{100 * low:.1f} % of 4,201 parameters" in told and " bytes, each alone." in told


@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_multiply_adds_of_a_network_without_any_are_refused_before_the_training(fit, unit):
    class Words(TwoParts):
        def forward(self, inputs):
            return inputs * 2

    text = r"`budget`: a run of the network on its example input must take multiply-adds for .* takes none"
    with pytest.raises(ValueError, match=text):
        fit(Words("", torch.zeros(4, 8)), LowRankCompression(budget={unit: 0.5, "multiply_adds": 0.5}, epochs=1))


def test_an_example_that_the_network_does_not_take_ends_no_training_that_needs_no_example(fit, new_module, messages):
    module = new_module()
    module.example_input_array = torch.zeros(4, 3)
    compression = LowRankCompression(0.5, epochs=1)
    match = r"the network must run on its `example_input_array`, and it raised RuntimeError: .* not affected"
    with pytest.warns(UserWarning, match=match):
        fit(module, compression)
    (told,) = [line for line in messages if line.startswith("Low-rank compression can go down to")]
    assert "Multiply-adds are known" in told and compression.allocation is not None
    assert compression._counting.observation is not None, "of the first batch"
