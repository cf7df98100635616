"""The metrics in a LightningModule: logged as any metric, beside the callback, and begun anew each epoch."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from lr_callback import ALDS, LowRankCompression
from lr_callback.metrics import EffectiveRank, KeptCost, PredictionAgreement, RelativeLayerError
from lr_callback.metrics.functional import effective_rank, kept_cost, prediction_agreement, relative_layer_error


def pairs(dense, network):
    return [
        (one, layer) for one, layer in zip(dense, network, strict=True) if type(one).__name__ in ("Conv2d", "Linear")
    ]


class Beside(Callback):
    """Note what is logged, and what the functions say of the same network on all images."""

    def __init__(self, dense, images):
        self.dense, self.images, self.logged, self.wanted = dense, images, [], []

    @torch.no_grad()
    def on_validation_end(self, trainer, pl_module):
        names = ("kept", "agreement", "error", "rank")
        self.logged.append({name: trainer.callback_metrics[name].item() for name in names})
        both = pairs(self.dense, pl_module.network)
        values = (
            kept_cost(pl_module.network),
            prediction_agreement(pl_module.network(self.images), self.dense(self.images)),
            max(relative_layer_error(*pair, "operator") for pair in both),
            torch.stack([effective_rank(layer) for _, layer in both]).mean(),
        )
        self.wanted.append({name: value.item() for name, value in zip(names, values, strict=True)})


def measured(kind, dense):
    """Return a class of modules that log the metrics, compared with a network."""

    class Measured(kind):
        def __init__(self):
            super().__init__()
            self.agreement, self.kept = PredictionAgreement(), KeptCost()
            self.error, self.rank = RelativeLayerError("operator"), EffectiveRank()

        def on_validation_epoch_start(self):
            self.kept.update(self.network)
            for one, layer in pairs(dense, self.network):
                self.error.update(one, layer)
                self.rank.update(layer)

        def validation_step(self, batch, batch_idx):
            self.agreement.update(self(batch[0]), dense(batch[0]))
            self.log("agreement", self.agreement)
            self.log_dict({"kept": self.kept, "error": self.error, "rank": self.rank})

    return Measured


def test_what_is_logged_is_what_the_functions_say_of_every_epoch(fit, new_module, digits):
    dense = copy.deepcopy(new_module().network).eval()
    beside = Beside(dense, digits.tensors[0])
    fit(measured(new_module, dense)(), LowRankCompression(0.4, method=ALDS()), beside, max_epochs=3)
    assert len(beside.logged) == 3
    for logged, wanted in zip(beside.logged, beside.wanted, strict=True):
        assert logged == pytest.approx(wanted, rel=1e-5)
    assert [one["kept"] <= 0.4 for one in beside.logged] == [False, True, True]
    assert beside.logged[0]["kept"] == 1 and beside.logged[0]["agreement"] < 1
    assert beside.logged[0]["rank"] > beside.logged[1]["rank"]


def test_a_module_with_metrics_has_the_state_dict_that_it_had(new_module):
    plain = new_module()
    assert list(measured(new_module, plain.network)().state_dict()) == list(plain.state_dict())
