"""``load_from_checkpoint`` of files from before and after a compression; and structures that come at the wrong time."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD

import lr_callback as lrc
from lr_callback import ALDS, LowRankCompression, LowRankMixin, load_from_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Small(LightningModule):
    def __init__(self, width: int = 32, seed: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05, momentum=0.9)


class Mixed(LowRankMixin, Small):
    pass


class InConfigureModel(LowRankMixin, LightningModule):
    """Make the layers where Lightning asks for them."""

    def __init__(self):
        super().__init__()
        self.network = None

    def configure_model(self):
        if self.network is None:
            self.network = Small(48).network


@pytest.fixture(scope="module")
def files(tmp_path_factory, loader, new_trainer):
    """Return dense, cut and weights-only files of a run, by name, and what each holds."""
    root = tmp_path_factory.mktemp("files")

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for kind in ("whole", "weights"):
                path = root / f"{kind}-{trainer.current_epoch}.ckpt"
                trainer.save_checkpoint(path, weights_only=kind == "weights")

    callback = LowRankCompression([0.6, 0.4], [1, 2], method=ALDS(), refit=None, show_table=False)
    new_trainer(root, callback, Save()).fit(Small(48), loader(), loader())
    return {path.stem: path for path in root.glob("*.ckpt")}


def states(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same(one, other):
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


NAMES = [f"{kind}-{epoch}" for kind in ("whole", "weights") for epoch in range(3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["helper", "helper, base class", "mixin", "configure_model"])
@pytest.mark.situation("Checkpoints", "load_from_checkpoint by the helper or the mixin", "works")
def test_a_module_is_made_from_a_file_of_any_structure(files, name, how):
    loaded = {
        "helper": lambda path: load_from_checkpoint(Small, path),
        "helper, base class": lambda path: load_from_checkpoint(Mixed, path),
        "mixin": lambda path: Mixed.load_from_checkpoint(path, weights_only=True),
        "configure_model": lambda path: InConfigureModel.load_from_checkpoint(path, weights_only=True),
    }[how](files[name])
    assert same(loaded.state_dict(), states(files[name]))
    assert (type(loaded.network[1]) is nn.Linear) is name.endswith("0")
    assert how == "configure_model" or loaded.hparams.width == 48
    assert "load_state_dict" not in vars(Small)
    loaded.load_state_dict(states(files["whole-0"]))  # and any other structure later
    assert type(loaded.network[1]) is nn.Linear


@pytest.mark.situation("Checkpoints", "load_from_checkpoint of a class without the mixin", "refused")
def test_the_class_alone_loads_dense_files_and_says_what_it_misses_in_others(files):
    assert same(Small.load_from_checkpoint(files["whole-0"], weights_only=True).state_dict(), states(files["whole-0"]))
    with pytest.raises(RuntimeError, match=r'(?s)Missing key\(s\).*: "network\.1\.weight".*encoder\.weight'):
        Small.load_from_checkpoint(files["whole-2"], weights_only=True)


def test_arguments_are_those_of_lightning(files, tmp_path):
    state = states(files["whole-2"])
    other = {**state, "elsewhere": state["network.1.decoder.bias"]}
    del other["network.1.decoder.bias"]
    checkpoint = {**torch.load(files["whole-2"], weights_only=True), "state_dict": other}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match="Found keys that are"):
        loaded = load_from_checkpoint(Small, tmp_path / "other.ckpt", strict=False, map_location="cpu", seed=5)
    assert loaded.hparams.seed == 5
    assert torch.equal(loaded.network[1].encoder.weight, state["network.1.encoder.weight"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "network\.1\.decoder\.bias"'):
        load_from_checkpoint(Small, tmp_path / "other.ckpt")
    other["network.1.decoder.bias"] = torch.zeros(47)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"decoder\.bias: shape \(48,\) in the model, shape \(47,\) in the file"):
        load_from_checkpoint(Small, tmp_path / "other.ckpt", strict=False)
    asked = []
    load_from_checkpoint(Small, files["whole-2"], map_location=lambda storage, place: asked.append(place))
    assert set(asked) == {"cpu"}
    with files["whole-2"].open("rb") as file:
        assert same(load_from_checkpoint(Small, file).state_dict(), state)


@pytest.mark.parametrize("cls", [nn.Linear, nn.Linear(2, 2), LowRankMixin, "Small", None], ids=str)
def test_what_is_no_lightning_module_is_refused(cls, files):
    message = r"`cls` must be a LightningModule's class, got .*`lr_callback\.restore_\(model, path\)`"
    with pytest.raises(TypeError, match=message):
        load_from_checkpoint(cls, files["whole-0"])


def test_a_class_is_as_it_was_after_a_load_that_failed(files, tmp_path):
    own = Mixed.load_state_dict
    for cls in (Small, Mixed):
        with pytest.raises(FileNotFoundError):
            load_from_checkpoint(cls, tmp_path / "gone.ckpt")
    assert Mixed.load_state_dict is own
    assert "load_state_dict" not in vars(Small) | vars(Mixed)


def test_the_mixin_must_come_first_and_in_a_module():
    with pytest.raises(TypeError, match=r"LowRankMixin must come first.*Late, found \(LightningModule, LowRankMixin\)"):

        class Late(LightningModule, LowRankMixin):
            pass

    class Alone(LowRankMixin):
        pass

    with pytest.raises(TypeError, match=r"LowRankMixin: Alone must be an nn\.Module as well"):
        Alone()


PLAIN = """
import sys
import lr_callback
class Network(lr_callback.LowRankMixin, __import__("torch").nn.Module):
    pass
Network()
assert not {"lightning", "pytorch_lightning", "torchmetrics"} & set(sys.modules)
"""


def test_the_mixin_needs_no_lightning():
    subprocess.run([sys.executable, "-W", "error", "-c", PLAIN], check=True, timeout=120)


class Bomb:
    """Write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.situation("Checkpoints", "file with pickled objects", "refused")
def test_nothing_is_ever_unpickled(files, tmp_path, loader, new_trainer):
    checkpoint = torch.load(files["whole-2"], weights_only=True)
    checkpoint["callbacks"]["LowRankCompression"]["allocation"]["layers"] = Bomb(Path(tmp_path / "gone off"))
    torch.save(checkpoint, path := tmp_path / "bomb.ckpt")
    trainer = new_trainer(tmp_path, LowRankCompression([0.6, 0.4], [1, 2]), max_epochs=4)
    for load in (
        lambda: load_from_checkpoint(Small, path),
        lambda: lrc.restore_(Small(48), path),
        lambda: trainer.fit(Small(48), loader(), loader(), ckpt_path=path),
        lambda: trainer.test(Small(48), loader(), ckpt_path=path),
    ):
        with pytest.raises(Exception, match=r"[Ww]eights.only|objects other than tensors"):
            load()
    assert not (tmp_path / "gone off").exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert (tmp_path / "gone off").exists()


class Loads(Callback):
    """Load a state dict in one hook of the second epoch, as a callback of one's own may."""

    def __init__(self, hook, source):
        self.refused, self.source = None, source
        setattr(self, hook, self.load)

    def load(self, trainer, pl_module, *_):
        if trainer.current_epoch < 1 or self.refused is not None:
            return
        before = (list(pl_module.modules()), copy.deepcopy(dict(pl_module.state_dict())))
        try:
            pl_module.load_state_dict(self.source)
            self.refused = ""
        except ValueError as error:
            self.refused = str(error)
            assert list(pl_module.modules()) == before[0]
            assert same(dict(pl_module.state_dict()), before[1])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.situation("Checkpoints", "load_state_dict of another structure in the middle of fit", "refused")
def test_another_structure_in_the_middle_of_a_fit_is_refused(hook, files, tmp_path, loader, new_trainer):
    loads = Loads(hook, states(files["whole-0"]))
    trainer = new_trainer(tmp_path, LowRankCompression(0.4, 1), loads)
    trainer.fit(Small(48), loader(), loader())
    assert "in the middle of a training" in loads.refused
    assert "it is factorized otherwise at network.1" in loads.refused
    assert "Nothing was changed" in loads.refused
    held = {id(one) for one in trainer.optimizers[0].param_groups[0]["params"]}
    assert held == {id(one) for one in trainer.lightning_module.parameters()}


@pytest.mark.situation("Checkpoints", "load_state_dict of the same structure in the middle of fit", "works")
def test_the_same_structure_may_be_loaded_and_any_at_the_end(files, tmp_path, loader, new_trainer):
    same_structure = Loads("on_train_batch_end", states(files["whole-0"]))
    at_the_end = Loads("on_train_end", states(files["whole-2"]))
    module = Small(48)
    with pytest.warns(UserWarning, match="never reached"):
        new_trainer(tmp_path, at_the_end, LowRankCompression(0.4, 9), same_structure).fit(module, loader(), loader())
    assert same_structure.refused == at_the_end.refused == ""
    assert same(module.state_dict(), states(files["whole-2"]))


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.situation("Checkpoints", "test, validate, predict with ckpt_path='best' from either side", "works")
def test_best_may_be_on_either_side_and_fit_goes_on_afterwards(epoch, stage, tmp_path, loader, new_trainer):
    class Score(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", float(trainer.current_epoch == epoch))

    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    callback = LowRankCompression(0.4, 1, method=ALDS(), refit=None, show_table=False, reset_monitors=False)
    module = Small(48)
    trainer = new_trainer(tmp_path, Score(), callback, best, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    expected = load_from_checkpoint(Small, best.best_model_path)
    assert epoch == torch.load(best.best_model_path, weights_only=True)["epoch"]
    assert (type(expected.network[1]) is nn.Linear) is (epoch == 0)
    options = {} if stage == "predict" else {"verbose": False}
    outputs = getattr(trainer, stage)(module, loader(), ckpt_path="best", **options)
    assert same(module.state_dict(), expected.state_dict())
    if stage == "predict":
        assert torch.equal(torch.cat(outputs), expected.eval()(torch.cat([batch[0] for batch in loader()])))
    assert callback.state_dict()["applied"] == ([] if epoch == 0 else [1])
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, loader(), loader())
    assert trainer.current_epoch == 5
    assert callback.state_dict()["applied"] == [1]
    assert type(module.network[1]) is lrc.FactorizedLinear
    held = {id(one) for one in trainer.optimizers[0].param_groups[0]["params"]}
    assert held == {id(one) for one in module.parameters()}
