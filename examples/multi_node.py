r"""Low-rank compression on several machines: DDP, one process for each device, started by torchrun.

On each of two machines with four GPUs:

    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=FIRST_MACHINE:29500 \
        --rdzv_id=compression examples/multi_node.py --accelerator gpu

On one machine, with two processes on its CPU:

    torchrun --standalone --nproc_per_node=2 examples/multi_node.py

The processes share out the analysis, and all of them go on with the same factors, bit for bit. Checkpoints go into a
folder that all machines see. The first process prints the parameters before and after, and the accuracy on the test
images. It needs scikit-learn (``pip install -e '.[examples]'``) for its images, and half a minute of two CPU cores.
"""

import argparse
import os
import tempfile

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lr_callback as lrc
from lr_callback.recipes import CifarResNet, DigitsData, ImageClassifier


def trainer(accelerator: str, epochs: int, folder: str) -> Trainer:
    """Return a Trainer of all processes that torchrun has started, which compresses at half of the epochs."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise SystemExit(
            "multi_node.py must be started by torchrun, which says how many processes there are. On one machine: "
            "torchrun --standalone --nproc_per_node=2 examples/multi_node.py"
        )
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return Trainer(
        accelerator=accelerator,
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local,
        strategy="ddp",
        max_epochs=epochs,
        default_root_dir=folder,
        log_every_n_steps=5,
        enable_progress_bar=False,
        callbacks=[
            lrc.LowRankCompression(keep_ratio=0.3, epochs=epochs // 2),
            ModelCheckpoint(folder, save_last=True),
        ],
    )


def parameters(of: ImageClassifier) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in of.parameters())


def main(accelerator: str, epochs: int, folder: str) -> None:
    """Train and test, the files in a folder."""
    seed_everything(0)
    model = ImageClassifier(CifarResNet(depth=8, in_channels=1, width=16), learning_rate=0.05)
    host, data = trainer(accelerator, epochs, folder), DigitsData()
    dense = parameters(model)
    host.fit(model, data)
    if host.is_global_zero:
        print(f"{host.world_size} processes: {dense:,} -> {parameters(model):,} parameters")
    host.test(model, data, ckpt_path=host.checkpoint_callback.last_model_path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--folder", help="for the checkpoints; all machines must see it")
    arguments = parser.parse_args()
    if arguments.folder:
        main(arguments.accelerator, arguments.epochs, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(arguments.accelerator, arguments.epochs, temporary)
