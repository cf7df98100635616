"""Files: measured times on the disk, one file for each device, read in milliseconds by the next run.

They are in ``lr_callback/latency`` in the folder that ``LR_CALLBACK_CACHE`` names, or ``XDG_CACHE_HOME``, or
``~/.cache``. A file says which device it is of, and is refused on another.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from math import inf
from pathlib import Path
from time import sleep, time
from typing import Any

import torch

from lr_callback.common.written import is_number
from lr_callback.units.latency.timing import Timing

VERSION = 2
STEADY = 0.25
"""Spread of runs up to which their time is kept."""
LEFT_BEHIND = 20.0
"""Seconds after which a lock is of a process that is no more."""
_VARIABLE = "LR_CALLBACK_CACHE"


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return what the time of a layer depends on besides the layer: the device, its libraries, how they are set."""
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "type": device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        cudnn = {"cudnn": torch.backends.cudnn.enabled, "benchmark": torch.backends.cudnn.benchmark}
        return {**facts, **cudnn, "name": torch.cuda.get_device_name(device), "tf32": _tf32()}
    name = {"name": processor(), "capability": torch.backends.cpu.get_cpu_capability()}
    return {**facts, **name, "threads": torch.get_num_threads(), "mkldnn": torch.backends.mkldnn.enabled}


def _tf32() -> list[object]:
    """Return in which precision float32 is multiplied; torch refuses the old question once the new one was answered."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    return [getattr(kind, "fp32_precision" if hasattr(kind, "fp32_precision") else "allow_tf32") for kind in kinds]


def processor() -> str:
    """Return the name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def folder() -> Path:
    """Return the folder of the files."""
    named = os.environ.get(_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "lr_callback" / "latency"


class Times:
    """The times that are known of a device: those of its file, and what has been measured since.

    Args:
        device: a tensor's.

    Raises:
        ValueError: If the file is of another device.
    """

    def __init__(self, device: torch.device) -> None:
        self._facts = device_facts(device)
        mark = hashlib.sha256(json.dumps([VERSION, self._facts], sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder() / f"{mark}.json"
        self._known = self._read(tell=True)
        self._new: dict[str, dict[str, Timing]] = {}
        self._forgotten: set[str] = set()

    def get(self, layer: str, form: str) -> Timing | None:
        """Return the time of a form of a layer with its input, if it is known."""
        return self._new.get(layer, {}).get(form) or self._known.get(layer, {}).get(form)

    def put(self, layer: str, form: str, timing: Timing) -> None:
        """Note a time."""
        self._new.setdefault(layer, {})[form] = timing

    def forget(self, layer: str) -> None:
        """Let all times of a layer be unknown, in the file, too, once it is written."""
        self._new.pop(layer, None)
        self._known.pop(layer, None)
        self._forgotten.add(layer)

    @staticmethod
    def keeps(timing: Timing) -> bool:
        """Return whether a time is steady enough to be kept for the next run."""
        return timing.spread <= STEADY

    def _steady(self, forms: Mapping[str, Timing]) -> dict[str, Timing]:
        return {form: time for form, time in forms.items() if self.keeps(time)}

    def save(self) -> None:
        """Write what is new, together with what other runs have written since; warn where it cannot be written.

        What was measured while runs differed by more than a quarter is of use now, and measured again by the next run.
        """
        steady = {layer: self._steady(forms) for layer, forms in self._new.items()}
        if not any(steady.values()) and not self._forgotten:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.with_suffix(".lock")):
                self._merge(steady)
        except OSError as error:
            warnings.warn(
                f"Measured times are not kept for the next run: {error.strerror} ({self.path.parent}). Set "
                f"{_VARIABLE} to a folder that can be written.",
                stacklevel=2,
            )

    def _merge(self, new: Mapping[str, Mapping[str, Timing]]) -> None:
        merged = self._read(tell=False)
        for layer in self._forgotten:
            merged.pop(layer, None)
        for layer, forms in new.items():
            merged.setdefault(layer, {}).update(forms)
        times = {layer: {form: [*astuple(time)] for form, time in forms.items()} for layer, forms in merged.items()}
        _write(self.path, json.dumps({"version": VERSION, "device": self._facts, "times": times}))

    def _read(self, tell: bool) -> dict[str, dict[str, Timing]]:
        try:
            if not self.path.is_file():
                return {}
            written = _checked(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            if tell:
                warnings.warn(
                    f"Latency file {self.path}: it must be JSON with times as this version writes it, and cannot be "
                    f"read ({type(error).__name__}: {error}). The layers are measured again, and it is written anew.",
                    stacklevel=3,
                )
            return {}
        if written["device"] != self._facts:
            raise ValueError(_other_device(self.path, written["device"], self._facts))
        known = {
            layer: {form: Timing(*time) for form, time in forms.items()} for layer, forms in written["times"].items()
        }
        return {layer: self._steady(forms) for layer, forms in known.items()}


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is between reading and writing, and let none be while this one is.

    A lock is held for milliseconds: an old one is of a process that was killed, and is removed.
    """
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if _age(lock) > LEFT_BEHIND:
                lock.unlink(missing_ok=True)
            sleep(0.005)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the seconds since a file was written; of one that is gone none."""
    try:
        return time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write(path: Path, text: str) -> None:
    """Write a file as a whole: who reads it meanwhile finds the former one."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).chmod(0o644)  # a folder may be shared, and a temporary file is its owner's alone
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _checked(written: object) -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        ValueError: If it is no file of times, or of a newer version.
    """
    if isinstance(written, dict) and written.get("version") == VERSION and isinstance(written.get("device"), dict):
        times = written.get("times")
        if isinstance(times, dict) and all(
            isinstance(of, dict) and all(map(_is_time, of.values())) for of in times.values()
        ):
            return written
    raise ValueError(f"no version {VERSION} with a device and times of layers")


def _is_time(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    nanoseconds, spread = value
    return type(nanoseconds) is int and 0 < nanoseconds < 2**53 and is_number(spread) and 0 <= spread < inf


def _other_device(path: Path, found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    differing = sorted(name for name in {*found, *own} if found.get(name) != own.get(name))
    listed = "; ".join(f"{name}: {found.get(name)!r}, here {own.get(name)!r}" for name in differing)
    return (
        f"Latency file {path}: it must be of this device, and is of another ({listed}). Times of one device say "
        f"nothing of another: remove the file, or set {_VARIABLE} to another folder."
    )
