"""Far down in steps, learning from the dense network: several ``epochs``, and ``distill``, against one cut.

    python examples/gradual_distillation.py

Four runs of the same network with the same seed for as many epochs: cut at once, in steps, in steps with distillation,
and left dense. It prints the parameters that are left and the accuracy on the test images of each, as they come: which
way is best depends on the network and on the time that is left, and one seed cannot tell. It needs scikit-learn
(``pip install -e '.[examples]'``) for its images, and less than half a minute of one CPU core.
"""

import tempfile

from lightning.pytorch import Trainer, seed_everything

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier

EPOCHS = 16
WAYS = {
    "dense control": None,
    "at once": {"keep_ratio": 0.15, "epochs": 8},
    "in steps": {"keep_ratio": [0.5, 0.25, 0.15], "epochs": [8, 10, 12]},
    "in steps, distilled": {"keep_ratio": [0.5, 0.25, 0.15], "epochs": [8, 10, 12], "distill": 0.5},
    # One fraction, to which a cubic curve leads: {"keep_ratio": 0.15, "epochs": [8, 9, 10, 11, 12], "ramp": True}
}


def run(arguments: dict[str, object] | None, folder: str) -> tuple[int, float]:
    """Train, compressed as the arguments of the callback say; return the parameters left and the test accuracy."""
    seed_everything(0, verbose=False)
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=8), learning_rate=0.05, schedule="cosine")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if arguments is None else [lrc.LowRankCompression(**arguments, show_table=False)],
    )
    data = DigitsData()
    trainer.fit(model, data)
    [result] = trainer.test(model, data, verbose=False)
    return sum(parameter.numel() for parameter in model.parameters()), result["test_accuracy"]


def main(folder: str) -> None:
    """Run the example, its files in a folder."""
    results = {name: run(arguments, folder) for name, arguments in WAYS.items()}
    dense, _ = results["dense control"]
    for name, (parameters, accuracy) in results.items():
        print(f"{name:20} {parameters:7,} parameters ({parameters / dense:6.1%})  test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
