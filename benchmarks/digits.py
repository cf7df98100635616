"""The digits run over several seeds: compressed on the way against dense for the same number of epochs.

    python benchmarks/digits.py --seeds 5

Each run is ``lr-callback fit --config configs/digits.yaml`` in this process; the dense control is the same
configuration with the compression's epoch beyond the end.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from environment import keep, markdown

from lr_callback.commands.compression_cli import CompressionCLI

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
NEVER = 1_000_000


def run(seed: int, keep_ratio: float, dense: bool) -> dict[str, float]:
    """Fit with one seed in a scratch folder; return the test metrics and the parameters of the final model."""
    arguments = ["--config", str(CONFIG), f"--seed_everything={seed}", f"--compress.keep_ratio={keep_ratio}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments += [f"--compress.epochs={NEVER}"] if dense else []
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "never reached" is what the control asks for
        os.chdir(folder)
        try:
            cli = CompressionCLI(args=["fit", *arguments], save_config_kwargs={"overwrite": True})
            tested = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
        finally:
            os.chdir(home)
    return {
        "test_accuracy": round(100 * tested["test_accuracy"], 2),
        "parameters": sum(parameter.numel() for parameter in cli.model.parameters()),
    }


def main() -> None:
    """Run every seed both ways, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep_ratio", type=float, default=0.3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        dense = run(seed, arguments.keep_ratio, dense=True)
        compressed = run(seed, arguments.keep_ratio, dense=False)
        rows.append({"seed": seed, "dense": dense, "compressed": compressed})
        print(rows[-1], flush=True)
    kept = rows[0]["compressed"]["parameters"] / rows[0]["dense"]["parameters"]
    columns = {kind: [row[kind]["test_accuracy"] for row in rows] for kind in ("dense", "compressed")}
    gaps = [after - before for before, after in zip(columns["dense"], columns["compressed"], strict=True)]
    table = markdown(
        ["", *(f"seed {row['seed']}" for row in rows), "mean", "standard deviation"],
        [
            [name, *(f"{value:.2f}" for value in values), f"{mean(values):.2f}", f"{stdev(values):.2f}"]
            for name, values in [*columns.items(), ("difference", gaps)]
        ],
    )
    title = f"Digits: test accuracy in percent, {kept:.1%} of the parameters kept against the dense control"
    command = f"python benchmarks/digits.py --seeds {arguments.seeds}"
    keep("digits", title, command, {"keep_ratio": arguments.keep_ratio, "rows": rows}, table)


if __name__ == "__main__":
    main()
