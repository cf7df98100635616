"""Repair: BatchNorm statistics are measured anew, and everything else is left alone."""

import copy

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.calibration.collect import collect_moments
from lr_callback.repair.recalibrate import correct_biases_, recalibrate_batchnorm_
from tests.unit.common.test_processes import on_ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=0.3)
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other, but=()):
    return all(torch.equal(value, other[name]) for name, value in one.items() if not name.endswith(but))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_statistics_are_the_mean_over_batches_of_each_batch():
    model = network()
    batches = [torch.randn(8, 4) + 3 for _ in range(5)]
    assert recalibrate_batchnorm_(model, batches) == 2
    with torch.no_grad():
        features = [model[0](batch) for batch in batches]
        normed = [nn.functional.batch_norm(one, None, None, model[1].weight, model[1].bias, True) for one in features]
        second = [model[3](one) for one in normed]  # dropout is off
    for layer, outputs in ((model[1], features), (model[4], second)):
        assert torch.allclose(layer.running_mean, torch.stack([one.mean(0) for one in outputs]).mean(0), atol=1e-5)
        assert torch.allclose(layer.running_var, torch.stack([one.var(0) for one in outputs]).mean(0), atol=1e-5)
        assert layer.num_batches_tracked == 5


def test_what_was_measured_before_leaves_no_trace():
    model, batches = network(), [torch.randn(8, 4) for _ in range(3)]
    recalibrate_batchnorm_(model, batches)
    before = state(model)
    for _ in range(4):
        model(100 * torch.randn(8, 4))
    recalibrate_batchnorm_(model, batches)
    assert same(state(model), before)


@pytest.mark.parametrize("training", [True, False])
def test_weights_modes_momentum_and_gradients_are_left_alone(training):
    model = network().train(training)
    model[2].eval()
    modes, before = [one.training for one in model.modules()], state(model)
    recalibrate_batchnorm_(model, [torch.randn(8, 4)])
    assert [one.training for one in model.modules()] == modes
    assert same(state(model), before, but=STATISTICS)
    assert not same(state(model), before)
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert all(one.grad is None for one in model.parameters())


def test_a_frozen_layer_in_a_training_model_is_left_alone():
    model = network()
    model[1].eval()
    before = state(model[1])
    assert recalibrate_batchnorm_(model, [torch.randn(8, 4) + 5]) == 1
    assert same(state(model[1]), before)
    assert not model[1].training


def test_in_a_model_in_eval_mode_no_layer_counts_as_frozen():
    assert recalibrate_batchnorm_(network().eval(), [torch.randn(8, 4)]) == 2


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))])
@pytest.mark.parametrize("batches", [[], [torch.randn(8, 4)]], ids=["no batches", "one batch"])
def test_a_model_without_statistics_has_nothing_to_measure(model, batches):
    assert recalibrate_batchnorm_(model, batches) == 0


def test_without_batches_it_is_refused_and_the_statistics_are_as_before():
    model = network()
    model(torch.randn(8, 4))
    before = state(model)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        recalibrate_batchnorm_(model, [])
    assert same(state(model), before)
    assert model[4].momentum == 0.3


def test_an_error_in_the_middle_leaves_everything_as_before():
    def broken():
        yield torch.randn(8, 4)
        raise OSError("the disk is gone")

    model = network()
    model(torch.randn(8, 4))
    before = state(model)
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate_batchnorm_(model, broken())
    assert same(state(model), before)
    assert all(one.training for one in model.modules())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x, None]], ids=["tensor", "tuple", "list"])
def test_the_inputs_are_the_batch_or_its_first_entry(wrap):
    one, other, batch = network(), network(), torch.randn(8, 4)
    recalibrate_batchnorm_(one, [batch])
    recalibrate_batchnorm_(other, [wrap(batch)])
    assert same(state(one), state(other))


def test_other_batches_are_run_by_the_function_that_is_given():
    one, other, batch = network(), network(), torch.randn(8, 4)
    recalibrate_batchnorm_(one, [batch])
    recalibrate_batchnorm_(other, [{"image": batch}], forward=lambda named: other(named["image"]))
    assert same(state(one), state(other))


@pytest.mark.parametrize("bias", [True, False])
def test_what_outputs_are_off_on_average_is_made_up_for(bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 24, 3, bias=bias, groups=3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 2, 3, padding=1, bias=bias),
    )
    batches = [torch.rand(8, 6, 9, 9) + 1 for _ in range(3)]
    recalibrate_batchnorm_(model, batches)
    model.eval()
    everything, dense = torch.cat(batches), copy.deepcopy(model)
    moments = lrc.collect_moments(model, batches)
    assert {name for name, one in moments.items() if one.means is not None} == ({"0", "3"} if bias else {"0"})
    method = lrc.ALDS("activation")
    allocation = lrc.allocate(model, 0.8, method=method, importance=moments, exclude=["3"])
    report = lrc.factorize_(model, allocation, importance=moments)
    with torch.no_grad():
        off = (model[:2](everything) - dense[:2](everything)).mean((0, 2, 3))
        assert correct_biases_(model, report.replaced, moments, batches) == 1
        left = (model[:2](everything) - dense[:2](everything)).mean((0, 2, 3))
    assert off.abs().max() > 1e-2 and left.abs().max() < 1e-4
    with pytest.raises(ValueError, match="at least one calibration batch, got none"):
        correct_biases_(model, report.replaced, moments, [])
    nothing = {"0": lrc.Importance(moments["0"].inputs)}
    assert correct_biases_(model, report.replaced, nothing, batches) == 0


def test_biases_of_transposed_layers_are_corrected():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.ConvTranspose2d(16, 24, 2, stride=2)), [torch.randn(64, 16, 3, 3) + 1]
    moments, wanted = collect_moments(model, batches), model(batches[0]).mean((0, 2, 3))
    allocation = lrc.allocate(model, 0.3, method=lrc.ALDS("activation"), importance=moments)
    report = lrc.factorize_(model, allocation, importance=moments)
    assert correct_biases_(model, report.replaced, moments, batches) == 1
    assert torch.allclose(model(batches[0]).mean((0, 2, 3)), wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_sync_batchnorm_is_measured_on_each_process_alone_and_then_averaged(tmp_path):
    """Real processes: one that waited in a batch would never come back, for the other has fewer batches."""
    batches = [[torch.randn(8, 4) + rank for _ in range(3 - rank)] for rank in range(2)]
    hooked = []

    def synced():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        model[1].register_forward_hook(lambda *_: hooked.append(1))
        return model

    def work(processes):
        model = synced()
        assert recalibrate_batchnorm_(model, batches[processes.rank], processes=processes) == 2
        assert type(model[1]) is nn.SyncBatchNorm and model[1].training and len(hooked) == 3 - processes.rank
        with pytest.raises((OSError, RuntimeError), match="the disk is gone"):
            recalibrate_batchnorm_(model, broken_on(processes.rank), processes=processes)
        return {name: value.tolist() for name, value in model.state_dict().items()}

    def broken_on(rank):
        yield torch.randn(8, 4)
        if rank == 1:
            raise OSError("the disk is gone")

    first, second = on_ranks(2, tmp_path, work)
    assert first == second
    alone = []
    for own in batches:
        model = network()
        recalibrate_batchnorm_(model, own)
        alone.append(state(model))
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.allclose(torch.tensor(first[name]), (3 * alone[0][name] + 2 * alone[1][name]) / 5)
    assert first["1.num_batches_tracked"] == first["4.num_batches_tracked"] == 5


def test_a_layer_that_is_not_called_keeps_its_statistics():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, inputs):
            return self.used(inputs)

    model = Branches()
    model.other(torch.randn(8, 4) + 3)
    before = state(model.other)
    assert recalibrate_batchnorm_(model, [torch.randn(8, 4) + 1]) == 1
    assert same(state(model.other), before) and model.used.running_mean.mean() > 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_is_refused_with_the_layer_and_nothing_changes(bad):
    model = network()
    model(torch.randn(8, 4))
    before, batch = state(model), torch.randn(8, 4)
    batch[3, 1] = bad
    with pytest.raises(ValueError, match=r"^1: the statistics of its inputs .* must be finite, found NaN or infinity"):
        recalibrate_batchnorm_(model, [torch.randn(8, 4), batch])
    assert same(state(model), before) and model[1].momentum == 0.1


def test_what_other_modules_count_in_buffers_stays():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, inputs):
            self.calls += 1
            return inputs

    model = nn.Sequential(Counting(), nn.BatchNorm1d(4))
    assert recalibrate_batchnorm_(model, [torch.randn(8, 4)] * 3) == 1
    assert model[0].calls == 0 and model[1].num_batches_tracked == 3


def test_layers_without_statistics_or_a_count_of_batches_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].running_mean = model[0].running_var = None
    model[1].num_batches_tracked = None
    before = model[1].running_mean.clone()
    assert recalibrate_batchnorm_(model, [torch.randn(8, 4) + 1]) == 1
    assert torch.equal(model[1].running_mean, before) and model[2].num_batches_tracked == 1
    lazy = nn.Sequential(nn.Identity(), nn.Sequential())
    lazy.spare = nn.LazyBatchNorm1d()
    lazy.forward = lambda inputs: inputs
    assert recalibrate_batchnorm_(lazy, [torch.randn(8, 4)]) == 0
