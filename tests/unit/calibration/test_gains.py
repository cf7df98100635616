"""Gains: the weights of outputs are those of the BatchNorm that takes them, and of no other."""

import pytest
import torch
from torch import nn

import lr_callback as lrc
from lr_callback.calibration.gains import batchnorm_importance
from tests.unit.common.test_processes import on_ranks


def shaken(model):
    """Give BatchNorm layers statistics and weights as after some training."""
    torch.manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.running_var is not None:
                norm.running_var.uniform_(0.1, 3)
            if norm.weight is not None:
                nn.init.normal_(norm.weight)
    return model


def network():
    torch.manual_seed(0)
    return shaken(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(24),
            nn.Flatten(),
            nn.Linear(96, 40),
            nn.BatchNorm1d(40, affine=False),
            nn.Linear(40, 30),
        )
    )


def gain(norm):
    gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
    return gamma.double() ** 2 / (norm.running_var.double() + norm.eps)


def images(count=9):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_outputs_count_as_the_batchnorm_right_after_them_multiplies_them():
    model, random = network().train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = batchnorm_importance(model, iter([images(), "is not run"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in model.modules())
    assert list(found) == ["0", "3", "7", "9"]
    assert torch.equal(found["0"].outputs, gain(model[1])) and torch.equal(found["7"].outputs, gain(model[8]))
    # What a ReLU has changed in place is the same tensor, and no output of the layer any more.
    assert found["3"].outputs is None and found["9"].outputs is None


def test_the_error_is_that_of_what_the_batchnorm_gives():
    model = nn.Sequential(nn.Linear(60, 40), nn.BatchNorm1d(40))
    shaken(model).eval()
    known, whole = batchnorm_importance(model, [torch.randn(5, 60)]), model[0].weight.detach().clone()
    allocation = lrc.allocate(model, 0.5, method=lrc.ALDS("batchnorm", max_slices=1), importance=known)
    lrc.factorize_(model, allocation, importance=known)
    rows = (model[1].weight.detach() / (model[1].running_var + model[1].eps).sqrt())[:, None]
    off = (rows * (whole - model[0].weight.detach())).norm() / (rows * whole).norm()
    assert allocation.layers["0"].relative_error == pytest.approx(off.item(), rel=1e-4)


def test_factorized_layers_transposed_ones_and_statistics_of_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(16, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 16, 3), nn.BatchNorm2d(16, momentum=None)
    )
    model.append(nn.Conv2d(16, 20, 3)).append(nn.BatchNorm2d(20, track_running_stats=False))
    shaken(model)
    lrc.factorize_(model, lrc.allocate(model, 0.5))
    batch = torch.randn(9, 16, 4, 4)
    found = batchnorm_importance(model, [batch])
    assert torch.equal(found["0"].outputs, gain(model[1])) and torch.equal(found["2"].outputs, gain(model[3]))
    model.eval()
    with torch.no_grad():
        variance = model[:5](batch).double().var((0, 2, 3), unbiased=False)
    assert torch.allclose(found["4"].outputs, model[5].weight.detach().double() ** 2 / (variance + 1e-5), rtol=1e-4)


class Shared(nn.Module):
    """One layer before two BatchNorms, one before a BatchNorm of positions, and one that is not called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.one, self.other = nn.Conv1d(20, 20, 1), nn.BatchNorm1d(20), nn.SyncBatchNorm(20)
        self.rows, self.positions, self.spare = nn.Linear(12, 12), nn.BatchNorm1d(20), nn.Linear(12, 12)

    def forward(self, signals):
        through = self.other(self.layer(input=torch.relu(self.one(self.layer(signals)))))
        return self.positions(input=self.rows(through))


def test_a_layer_before_two_counts_with_their_mean_and_other_axes_do_not():
    model = shaken(Shared())
    found = batchnorm_importance(model, [{"signals": torch.randn(3, 20, 12)}])
    assert set(found) == {"layer", "rows"} and found["rows"].outputs is None
    assert torch.allclose(found["layer"].outputs, (gain(model.one) + gain(model.other)) / 2)


def test_all_processes_get_what_the_first_finds(tmp_path):
    def work(processes):
        model = network()
        model[1].running_var.add_(processes.rank)
        return batchnorm_importance(model, [images()], processes=processes)["0"].outputs.tolist()

    found = on_ranks(2, tmp_path, work)
    assert found[0] == found[1] == gain(network()[1]).tolist()


@pytest.mark.situation("Repair", "errors weighted by BatchNorm, in a network without", "refused")
def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"none of the 1 layer\(s\) that were called is followed by one. Choose error="
    ):
        batchnorm_importance(nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.BatchNorm1d(30)), [torch.randn(4, 30)])
    with pytest.raises(ValueError, match="`batches` must hold at least one calibration batch, got none"):
        batchnorm_importance(network(), [])
    with pytest.raises(ValueError, match=r"error='batchnorm' is weighted: .*`batchnorm_importance\(model, batches\)`"):
        lrc.allocate(network(), 0.5, method=lrc.ALDS("batchnorm"))
    broken = network()
    broken[1].running_var[3] = torch.nan
    with pytest.raises(ValueError, match=r"0: the BatchNorm after it cannot weigh its outputs.* must be finite"):
        batchnorm_importance(broken, [images()])
