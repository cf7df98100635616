"""A study of hyper-parameters: how small may the network become, and by which method, for one point of accuracy?

    python examples/hyper_parameters.py

One dense network is trained; each combination then compresses a copy of it and trains on for as long as the dense
control. Chosen is the smallest network that is at most a point below the control on the validation images; the test
images are used once, in the end. One seed cannot tell small differences: ``lr-callback study`` (docs/STUDY.md) compares
methods over several. ``run`` is what a library such as Optuna would be given as its objective. It needs scikit-learn
(``pip install -e '.[examples]'``) for its images, and less than half a minute of one CPU core.
"""

import tempfile
from copy import deepcopy
from itertools import product

from lightning.pytorch import Callback, Trainer, seed_everything

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier

KEEP_RATIOS = [0.5, 0.3, 0.2]
METHODS = {
    "default": lambda: {},  # weighed by what comes into the layers and what they do, and a refit
    "ALDS alone": lambda: {"method": lrc.ALDS(), "refit": None},
    "plain SVD": lambda: {"method": lrc.UniformRank(), "refit": None},
}
DATA = DigitsData()


def fit(model: ImageClassifier, epochs: int, folder: str, *callbacks: Callback) -> Trainer:
    """Train a model; return its Trainer."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    trainer.fit(model, DATA)
    return trainer


def run(dense: ImageClassifier, folder: str, **arguments: object) -> tuple[float, Trainer]:
    """Compress a copy of the dense network and train it on; return its accuracy on the validation images, too."""
    compression = lrc.LowRankCompression(**arguments, epochs=0, show_table=False)
    trainer = fit(deepcopy(dense), 3, folder, compression)
    return float(trainer.callback_metrics["val_accuracy"]), trainer


def tested(trainer: Trainer) -> str:
    """Return the size of a network and its accuracy on the test images."""
    [result] = trainer.test(trainer.lightning_module, DATA, verbose=False)
    parameters = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    return f"{parameters:,} parameters, test accuracy {result['test_accuracy']:.3f}"


def main(folder: str) -> None:
    """Run the example, its files in a folder."""
    seed_everything(0, verbose=False)
    dense = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=8), learning_rate=0.05, schedule="cosine")
    fit(dense, 8, folder)
    control = fit(deepcopy(dense), 3, folder)
    wanted = float(control.callback_metrics["val_accuracy"]) - 0.01
    found = {}
    for keep_ratio, name in product(KEEP_RATIOS, METHODS):
        accuracy, trainer = run(dense, folder, keep_ratio=keep_ratio, **METHODS[name]())
        print(f"keep_ratio {keep_ratio:.2f}  {name:10}  val_accuracy {accuracy:.3f}  wanted {wanted:.3f}")
        if accuracy >= wanted:
            found[keep_ratio, accuracy] = f"{name} at {keep_ratio}", trainer
    print(f"dense control: {tested(control)}")
    if found:
        name, trainer = found[min(found, key=lambda key: (key[0], -key[1]))]
        print(f"chosen, {name}: {tested(trainer)}")
    else:
        print("none of them loses at most a point: keep more, or train for longer")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
