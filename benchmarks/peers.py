"""This package against what a user would pick instead, on the same networks at the same multiply-adds.

    python benchmarks/peers.py --data DIR

with torch-pruning and tltorch installed (a way whose package is missing is a row that says so). ``--networks``,
``--ratios`` and ``--ways`` measure a part; what was measured before of the others is kept, each row with the day and
the processor. A row is compared with the dense network of its own rounds. Without ``--data`` only networks with
random weights are measured.

Ways are those of ``ways.py``. All networks of a size are built first, and take turns then: the time of each is divided
by that of the dense network in the same round, and what is kept is the median over the rounds, so that a busy machine
disturbs all alike. Batches of 32 images on two threads, in eval mode and inference mode; convolutional networks have
their channels last in memory. Bytes are those of the saved state dict. Seconds are from the dense network to the
smaller one: to measure, to decide, to search and to build. A budget in time, ``cost="latency"``, is the largest under
which the multiply-adds are at most those asked. Multiply-adds are what torch's flop counter counts of the network that
is built, halved: it does not count the products of queries, keys and values.

The attention of ViT-B/16 is an ``nn.MultiheadAttention``, which reads its weights directly: a third of the
multiply-adds, that nothing can stand in for. The ways of lr_callback, plain SVD and Tucker layers take the network
after ``lrc.split_attention_``, which puts ``Linear`` layers there that compute the same, and so reach 0.3; splitting is
a part of their seconds. The dense row and torch-pruning, which knows that module, keep the network as torchvision
makes it.

ResNet18 and ViT-B/16 have random weights: the error is the distance of their outputs from the dense ones, relative to
these, on the batch. ResNet20 and ResNet56 are trained: their accuracy is that on the 10,000 test images of CIFAR-10,
right after the cut, and with BatchNorm recalibrated on 1,000 training images; nothing is trained.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
from accuracy import accuracy, images, laid_out
from analysis import network, seconds
from environment import RESULTS, environment, keep, markdown
from networks import trained
from torch import nn
from ways import OURS, WAYS, WITH_DATA, Subject, multiply_adds

import lr_callback as lrc
from lr_callback.analysis.analyze import survey
from lr_callback.model.observe import observe
from lr_callback.model.pricing import Prices
from lr_callback.recipes import CIFAR10Data

RANDOM = ("resnet18", "vit_b_16")
TRAINED = ("resnet20", "resnet56")
RATIOS = (0.5, 0.3)
BATCH, THREADS = 32, 2
CALIBRATION = {"batch_size": 250, "recalibration_batches": 4, "refit_batches": 8, "seed": 0}

Row = dict[str, Any]


def subject(name: str, data: CIFAR10Data | None) -> Subject:
    """Return a network with its images: random ones, where its weights are random."""
    torch.manual_seed(CALIBRATION["seed"])
    if data is None:
        batch = torch.randn(BATCH, 3, 224, 224)
        return Subject(name, partial(untrained, name), laid_out(batch) if name.startswith("resnet") else batch)
    first = islice(data.train_dataloader(), CALIBRATION["refit_batches"])
    batches = [(laid_out(batch), labels) for batch, labels in first]
    weights = f"{data.data_dir}/cifar10_{name}.pt"
    return Subject(name, partial(trained, name, weights), batches[0][0][:BATCH], tuple(batches))


def untrained(name: str) -> nn.Module:
    """Return a network of torchvision with seeded weights; the last layer of a ViT, which is zero, gets some, too."""
    model = network(name).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return model


def measured(of: Subject, ratio: float, data: CIFAR10Data | None, rounds: int, ways: Sequence[str]) -> list[Row]:
    """Build a network in each way, let them take turns, and return a row for each; the first is the dense one."""
    models: dict[str, nn.Module] = {"dense": laid_out_model(of.make())}
    rows: dict[str, Row] = {"dense": {"seconds": 0.0, "left_dense": left_dense(of.make(), of)}}
    total = multiply_adds(models["dense"], of)
    for name in ways:
        rows[name], model = built(name, of, ratio)
        if model is not None:
            models[name] = laid_out_model(model)
    times = taking_turns(models, of, rounds)
    for name, model in models.items():
        kept = multiply_adds(model, of) / total
        rows[name] |= {"kept": kept, **speed(times[name], times["dense"], kept)}
        rows[name] |= {"bytes": size(model), "error": distance(model, models["dense"], of)}
        rows[name] |= {} if data is None else accuracies(deepcopy(model), data)
        print(of.name, ratio, name, rows[name], flush=True)
    where = environment()
    same = {
        "network": of.name,
        "ratio": ratio,
        "rounds": rounds,
        "date": where["date"],
        "processor": where["processor"],
    }
    return [{**same, "way": name, **row} for name, row in rows.items()]


def left_dense(model: nn.Module, of: Subject) -> float:
    """Return the share of the multiply-adds that no layer has which this package can factorize; attention is split."""
    lrc.split_attention_(model)
    found = survey(model, prices=Prices("multiply_adds", observe(model, of.example)))
    return 1 - sum(layer.dense_cost for layer in found.layers.values()) / found.dense_cost


def built(name: str, of: Subject, ratio: float) -> tuple[Row, nn.Module | None]:
    """Build a network in one way, and say how long it took, or why it cannot be."""
    model, start = of.make(), perf_counter()
    try:
        smaller = WAYS[name](model, of, ratio).eval()
    except (ModuleNotFoundError, ValueError) as error:
        return {"reason": str(error)}, None
    return {"seconds": perf_counter() - start}, smaller


def laid_out_model(model: nn.Module) -> nn.Module:
    """Return a model whose convolutions have their channels last in memory."""
    smaller: nn.Module = model.to(memory_format=torch.channels_last)
    return smaller


@torch.inference_mode()
def taking_turns(models: dict[str, nn.Module], of: Subject, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a batch in each round; the round before the first warms up."""
    times = [{name: seconds(partial(model, of.batch)) for name, model in models.items()} for _ in range(rounds + 1)]
    return {name: [one[name] for one in times[1:]] for name in models}


def speed(times: Sequence[float], dense: Sequence[float], kept: float) -> Row:
    """Return milliseconds, and the medians of what is divided within a round."""
    each = [other / own for own, other in zip(times, dense, strict=True)]
    row = {"milliseconds": 1000 * median(times), "speed_up": median(each), "of_reduction": median(each) * kept}
    return {**row, "speed_ups": [round(one, 3) for one in each]}


def size(model: nn.Module) -> int:
    """Return the bytes of the saved state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


@torch.inference_mode()
def distance(model: nn.Module, dense: nn.Module, of: Subject) -> float:
    """Return the mean distance of the outputs for an image from the dense ones, relative to these."""
    wanted = dense(of.batch)
    return float(((model(of.batch) - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


def accuracies(model: nn.Module, data: CIFAR10Data) -> Row:
    """Return the accuracy right after the cut, and with BatchNorm recalibrated; the network is changed."""
    lrc.densify_(model)  # the same function, sooner
    row = {"accuracy": accuracy(model, data.test_dataloader())}
    torch.manual_seed(CALIBRATION["seed"])
    batches = islice(data.train_dataloader(), CALIBRATION["recalibration_batches"])
    lrc.recalibrate_batchnorm_(model, batches)
    return {**row, "recalibrated": accuracy(model, data.test_dataloader())}


MEASURES = {
    "speed_up": ("faster", max, "{:.2f} times", 0.05),
    "bytes": ("smaller on disk", min, "{:,} bytes", 0.0),
    "seconds": ("built sooner", min, "{:.1f} s", 0.2),
    "error": ("nearer to the dense outputs", min, "{:.3f}", 0.0),
    "accuracy": ("more accurate right after the cut", max, "{:.1f} %", 0.0),
    "recalibrated": ("more accurate with BatchNorm recalibrated", max, "{:.1f} %", 0.0),
}
"""What is compared, what it is to be better in it, which is the best, how it is written, what difference is noise."""


def wins(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each measure in which another way is better than every one of this package."""
    smaller = [row for row in rows if row["way"] != "dense" and "kept" in row]
    if not any(row["way"].startswith(OURS) for row in smaller):
        return [f"{row['way']} can be that small, and no way of {OURS} can" for row in smaller]
    sentences = []
    for key, (better, best, form, noise) in MEASURES.items():
        ours = [row[key] for row in smaller if key in row and row["way"].startswith(OURS)]
        others = [row for row in smaller if key in row and not row["way"].startswith(OURS)]
        if not others:
            continue
        winner = best(others, key=lambda row: row[key])
        its, own = winner[key], best(ours)
        written = form.format(its), form.format(own)
        if best(its, own) != own and abs(its - own) > noise * own and written[0] != written[1]:
            sentences.append(f"{winner['way']} is {better}: {written[0]}, {OURS} at best {written[1]}")
    return sentences


def cells(row: Row) -> list[str]:
    """Return a row of the table; one that could not be built says why."""
    if "reason" in row:
        return [row["way"], f"not built: {row['reason'].partition('. ')[0]}", *[""] * 7]
    figures = f"{row['kept']:.3f} {row['milliseconds']:.1f} {row['speed_up']:.2f} {row['of_reduction']:.2f}"
    after = f"{row['accuracy']:.1f} / {row['recalibrated']:.1f}" if "accuracy" in row else ""
    return [row["way"], *figures.split(), f"{row['bytes']:,}", f"{row['seconds']:.1f}", f"{row['error']:.3f}", after]


HEADER = (
    "way",
    "multiply-adds kept",
    "ms",
    "speed-up",
    "of the reduction",
    "bytes",
    "seconds to build",
    "error",
    "accuracy / recalibrated",
)


def text(rows: Iterable[Row]) -> str:
    """Return the tables, and under each where others win."""
    parts: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["network"], row["ratio"]), []).append(row)
    written = [
        "`of the reduction`: the speed-up, divided by how many times fewer the multiply-adds are; 1 is all of it. "
        "Tucker layers stand in place of convolutions with kernels above 1, except the first, and of Linear layers, "
        "except the last. Attention is split for all but the dense row and torch-pruning. Only the callback's default "
        "sees training images; nothing is trained. "
        "A speed-up is against the dense network in the same rounds; rows may be of different runs (`peers.json` has "
        "the `date` and the `processor` of those of a part), so that "
        "milliseconds of two rows do not compare as speed-ups do. The budget in time is the largest under which the "
        "multiply-adds are at most those asked."
    ]
    for (name, ratio), part in parts.items():
        lines = wins(part)
        told = {line.partition(":")[0] for line in lines}
        blind = [
            line
            for line in wins([row for row in part if row["way"] != WITH_DATA])
            if line.partition(":")[0] not in told
        ]
        lines = [*lines, *(f"without training images, {line}" for line in blind)] or ["none"]
        share = f"{100 * part[0]['left_dense']:.1f} %"
        written.append(f"## {name} at {ratio}")
        written.append(f"{share} of the multiply-adds are in layers that {OURS} leaves dense whatever the budget.")
        written += [markdown(HEADER, map(cells, part))]
        written.append("Where another way wins:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(written)


def merged(known: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Return rows in order, the new ones in place of the same of before; a part of the ways leaves the dense one."""
    listed, whole = {_key(row): row for row in known}, set(WAYS) <= {row["way"] for row in new}
    listed |= {_key(row): row for row in new if whole or row["way"] != "dense" or _key(row) not in listed}
    networks, ways = [*RANDOM, *TRAINED], ["dense", *WAYS]
    order = sorted(listed, key=lambda key: (networks.index(key[0]), -key[1], ways.index(key[2])))
    return [listed[key] for key in order]


def _key(row: Row) -> tuple[str, float, str]:
    return row["network"], row["ratio"], row["way"]


def kept_rows() -> list[Row]:
    """Return the rows of earlier runs."""
    file = RESULTS / "peers.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return rows


def main() -> None:
    """Measure every network at every size, and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of CIFAR-10 and of the trained networks, cifar10_NAME.pt")
    parser.add_argument("--networks", nargs="+", choices=[*RANDOM, *TRAINED])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", category=UserWarning)  # the libraries' own, of what they were asked for
    networks = arguments.networks or [*RANDOM, *(TRAINED if arguments.data else ())]
    wanted = [(name, ratio) for name in networks for ratio in arguments.ratios]
    for name, ratio in wanted:
        data = images(arguments.data, CALIBRATION["batch_size"]) if name in TRAINED else None
        new = measured(subject(name, data), ratio, data, arguments.rounds, arguments.ways)
        rows = merged(kept_rows(), new)
        command, title = "python benchmarks/peers.py --data DIR", "Against what a user would pick instead"
        keep("peers", title, command, {"calibration": CALIBRATION, "rows": rows}, text(rows))


if __name__ == "__main__":
    main()
