"""What a person sees on a terminal while a Trainer runs: lines of progress that move and go, and one table."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn

from lr_callback import LowRankCompression
from lr_callback.observation.progress import progress_line

pytest.importorskip("rich")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The calibration batches are few"),
]
BARS = pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
STEPS = ("calibration", "importance", "effects", "analysis", "decomposition", "refit", "BatchNorm")


class Screen:
    """A terminal of 80 columns in the place of the standard output, and what was written to it."""

    def __init__(self, patch):
        self._patch, self._parts, self.text, self.encoding = patch, [], "", "utf-8"

    def __enter__(self):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._out = os.fdopen(slave, "w", encoding=self.encoding)
        self._patch.setattr(sys, "stdout", self._out)
        self._patch.setenv("TERM", "xterm")
        for name in ("COLUMNS", "LINES"):
            self._patch.delenv(name, raising=False)

    def _read(self):
        try:
            while part := os.read(self._master, 65536):
                self._parts.append(part)
        except OSError:
            return  # the other end is closed

    def __exit__(self, *_):
        self._patch.undo()
        self._out.close()
        self._reader.join(10)
        os.close(self._master)
        # Without colours; a terminal turns each end of a line into two characters, and Rich may write both.
        self.text = re.sub(r"\x1b\[[\d;]*m", "", b"".join(self._parts).decode()).replace("\r\n", "\n")


@pytest.fixture
def screen(monkeypatch):
    return Screen(monkeypatch)


@BARS
def test_every_long_step_of_a_cut_moves_on_the_screen_and_is_gone_in_the_end(fit, new_module, screen, bar):
    compression = LowRankCompression(0.5, 1, recalibrate_batchnorm=True)
    with screen:
        fit(new_module(), bar(), compression, enable_progress_bar=True, max_epochs=2)
    before, after = screen.text.split(f"Low-rank compression at the start of epoch 1\n{compression.allocation}\n")
    assert [step for step in STEPS if f"Low-rank {step}" not in before] == []
    assert "Low-rank" not in after and "Epoch 1" in after


LONG = "model.encoder.layers.{}.attention.self.query"


@pytest.mark.parametrize(("encoding", "cells"), [("utf-8", "[█▏▎▍▌▋▊▉ ]"), ("ascii", "[#\\d ]")])
@pytest.mark.parametrize("step", STEPS)
def test_a_line_of_tqdm_has_room_for_bar_count_and_name_in_80_columns(screen, step, encoding, cells):
    screen.encoding = encoding
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[TQDMProgressBar()])
    with screen, progress_line(trainer, step) as progress:
        for done in (0, 1034, 2067):
            progress(done, 2068, LONG.format(done))
            time.sleep(0.11)  # tqdm draws no more often than each tenth of a second
    lines = [line for line in screen.text.split("\r") if line.startswith("Low-rank")]
    assert max(map(len, lines)) <= 80
    [last] = re.findall(rf"Low-rank {step}\|({cells}{{8,}})\| 2067/2068 \[00:0\d<00:0\d, (\S+)\]", "\n".join(lines))
    assert LONG.endswith(last[1].removeprefix("...")) and len(last[1]) == 18


def test_a_line_of_rich_has_room_for_bar_and_count_in_80_columns(fit, new_module, screen):
    with screen:
        fit(new_module(), RichProgressBar(), LowRankCompression(0.5, 1), enable_progress_bar=True, max_epochs=2)
    lines = [line for line in re.split(r"[\r\n]+", screen.text) if "Low-rank effects" in line]
    assert lines and all(re.search(r"Low-rank effects +[━╸╺ ]{8,} \d+/\d+ ", line) for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("columns", "name"), [(80, ""), (120, r" net\.\[bold\]a\\x1b\[2 +")])
def test_before_the_training_a_line_looks_like_rich_too_and_is_gone_in_the_end(screen, monkeypatch, columns, name):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[RichProgressBar()])
    with screen:
        monkeypatch.setenv("COLUMNS", str(columns))  # where Rich looks first
        with progress_line(trainer, "latency") as progress:
            for done in range(4):
                progress(done, 4, "net.[bold]a\x1b[2")
        assert trainer.progress_bar_callback.progress is None  # it was another display
        print("next")
    assert re.search(rf"Low-rank latency{name} ?[━╸╺ ]+ 3/4 ", screen.text)
    assert "Low-rank" not in screen.text.rpartition("\x1b[2K")[2]  # wiped
    assert max(map(len, re.split(r"[\r\n]+", screen.text))) <= columns + len("\x1b[1A\x1b[2K")


@BARS
def test_a_line_is_gone_after_an_error_too(fit, new_module, screen, bar):
    class Broken(new_module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and not self.training:  # it is in a calibration
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="broken"), screen:
        fit(Broken(), bar(), LowRankCompression(0.5, 1, refit="cut"), enable_progress_bar=True)
    assert "Low-rank calibration" in screen.text
    if bar is TQDMProgressBar:
        assert re.search(r"\r {70,}", screen.text.rpartition("Low-rank")[2])  # wiped
    else:
        assert "Low-rank" not in screen.text.rpartition("Epoch 1")[2]  # drawn once more, without it


class Marked(nn.Sequential):
    """Layers whose names Rich would take for markup, and that no terminal should be sent."""

    def __init__(self):
        super().__init__()
        self.add_module("flat", nn.Flatten())
        for name in ("[bold]a[/x]", ":smile:", "größe\x1b[2J"):
            self.add_module(name, nn.Linear(64, 64))
        self.add_module("head", nn.Linear(64, 10))


@BARS
def test_names_with_markup_and_control_characters_are_printed_as_text(fit, new_module, screen, bar):
    module = new_module()
    module.network = Marked()
    with screen:
        fit(module, bar(), LowRankCompression(0.5, 1), enable_progress_bar=True, max_epochs=2)
    rows = screen.text.partition("start of epoch 1")[2]
    for name in ("network.[bold]a[/x]  ", "network.:smile:  ", "network.gr\\xf6\\xdfe\\x1b[2J  "):
        assert f"\n{name}" in rows


@BARS
def test_layers_that_a_refit_leaves_are_told_of_above_the_bar(fit, new_module, screen, bar):
    torch.manual_seed(0)
    module = new_module()
    module.network = Marked()
    with screen:
        fit(module, bar(), LowRankCompression(0.5, 1, calibration_batches=1), enable_progress_bar=True, max_epochs=2)
    assert "layer(s) (network.[bold]a[/x], network.:smile:,\n  network.gr\\xf6\\xdfe\\x1b[2J" in screen.text
