"""Every optimizer goes on after a cut: factors train, all else stays, and a resumed run is the uninterrupted one."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import optim
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

from lr_callback import LowRankCompression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


OPTIMIZERS = {
    "SGD": lambda params: optim.SGD(params, lr=0.05),
    "SGD, momentum": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=False),
    "SGD, nesterov": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, dampening=0.1, foreach=True),
    "SGD, fused": lambda params: optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda params: optim.Adam(params, lr=0.005, foreach=False),
    "Adam, foreach": lambda params: optim.Adam(params, lr=0.005, foreach=True),
    "Adam, fused": lambda params: optim.Adam(params, lr=0.005, fused=True),
    "Adam, amsgrad": lambda params: optim.Adam(params, lr=0.005, amsgrad=True),
    "AdamW": lambda params: optim.AdamW(params, lr=0.005),
    "AdamW, amsgrad, fused": lambda params: optim.AdamW(params, lr=0.005, amsgrad=True, fused=True),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "Adagrad, fused": lambda params: optim.Adagrad(params, lr=0.01, fused=True),
    "RMSprop": lambda params: optim.RMSprop(params, lr=1e-3),
    "RMSprop, centered, momentum": lambda params: optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "Rprop": lambda params: optim.Rprop(params, lr=1e-3),
    "Adadelta": lambda params: optim.Adadelta(params, lr=1.0),
    "Adamax": lambda params: optim.Adamax(params, lr=0.005),
    "NAdam": lambda params: optim.NAdam(params, lr=0.005),
    "RAdam": lambda params: optim.RAdam(params, lr=0.005),
    "ASGD": lambda params: optim.ASGD(params, lr=0.05),
    "Adafactor": lambda params: optim.Adafactor(params, lr=0.01),
    "LBFGS": lambda params: optim.LBFGS(params, lr=0.1, max_iter=3),
}
NOT_HERE = {
    "Muon": "takes matrices only, tried with others",
    "SparseAdam": "takes sparse gradients only, which no layer that is factorized has",
    "Optimizer": "the base class",
}


def test_every_optimizer_of_torch_is_tried():
    there = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert there - {name.partition(",")[0] for name in OPTIMIZERS} - NOT_HERE.keys() == set()


def finished(trainer):
    return trainer.lightning_module.state_dict(), [each.state_dict() for each in trainer.optimizers]


@pytest.fixture
def resumes(tmp_path, loader, new_module, new_trainer, trained, same):
    """Return a function that checks a run and, with everything made anew, the rest of it after the epoch of the cut."""

    def check(optimize, **options):
        writer = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        whole = trained(new_module(optimize), writer, enable_checkpointing=True, options=options)
        again = new_trainer(tmp_path, LowRankCompression(0.5, 1, show_table=False, **options), max_epochs=3)
        again.fit(new_module(optimize), loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert again.global_step == whole.global_step
        assert all(map(same, finished(whole), finished(again)))

    return check


def works(group, names):
    return [pytest.param(name, marks=pytest.mark.situation(group, name, "works"), id=name) for name in names]


@pytest.mark.parametrize("name", works("Optimizers", OPTIMIZERS))
def test_each_optimizer_trains_the_factors_and_resumes_bit_for_bit(name, resumes):
    resumes(lambda module: OPTIMIZERS[name](list(module.parameters())))


PROJECTED = [name for name in OPTIMIZERS if name.startswith(("SGD, ", "Adam")) and name != "Adamax"]


@pytest.mark.parametrize("name", works("Optimizers, momentum projected", PROJECTED))
def test_projected_momentum_trains_on_and_resumes_bit_for_bit(name, resumes):
    resumes(lambda module: OPTIMIZERS[name](list(module.parameters())), optimizer_state="project")


def groups_by_kind(module):
    weights = [one for one in module.parameters() if one.dim() > 1]
    rest = [one for one in module.parameters() if one.dim() == 1]
    return optim.SGD([{"params": weights}, {"params": rest, "lr": 0.1, "weight_decay": 0.0}], lr=0.05, momentum=0.9)


def rate_of_each_layer(module):
    groups = [{"params": list(one.parameters())} for one in module.network if list(one.parameters())]
    return optim.AdamW([{**group, "lr": 0.01 * 0.8**index} for index, group in enumerate(groups)])


def rate_of_each_parameter(module):
    return optim.SGD([{"params": [one], "lr": 0.05} for one in module.parameters()], momentum=0.9)


def named(module):
    return optim.Adam(module.named_parameters(), lr=0.005)


def named_groups(module):
    of_name = list(module.named_parameters())
    biases = [pair for pair in of_name if pair[0].endswith("bias")]
    weights = [pair for pair in of_name if not pair[0].endswith("bias")]
    return optim.SGD([{"params": biases, "lr": 0.1}, {"params": weights}], lr=0.05, momentum=0.9)


def rule_of_each_parameter(module):
    optimizer = rate_of_each_parameter(module)
    powers = [one.dim() for one in module.parameters()]
    rules = [lambda step, power=power: 0.98 ** (step * power) for power in powers]
    warm = LinearLR(optimizer, 0.5, total_iters=2)
    course = SequentialLR(optimizer, [warm, LambdaLR(optimizer, rules)], milestones=[2])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": course, "interval": "step"}}


GROUPS = {
    "weights and biases apart": groups_by_kind,
    "a rate for each layer": rate_of_each_layer,
    "a group for each parameter": rate_of_each_parameter,
    "a group and a rule for each parameter": rule_of_each_parameter,
    "named parameters": named,
    "groups of named parameters": named_groups,
}


@pytest.mark.parametrize("name", works("Optimizers", GROUPS))
def test_groups_by_any_rule_resume_bit_for_bit(name, resumes):
    resumes(GROUPS[name])
