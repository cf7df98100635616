"""Tuned: what the forms of each layer and the whole model take on a device, and what is chosen by it: plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lr_callback.common.table import WIDTH, align, readable, shorten, wrap
from lr_callback.common.written import check_fields, read_json
from lr_callback.units.latency import Timing

AS_BUILT, ONE_BLOCK, DENSE = "as built", "one block", "dense"
"""Forms of a layer that compute the same: slices side by side; one slice, zeros outside the blocks; multiplied back."""
TUNED, CHANNELS_LAST, POINTWISE = "tuned", "channels_last", "pointwise"
"""What the whole model is timed as, besides as built: each layer in its chosen form; that, in this memory format; that,
its Linear layers as convolutions of one pixel."""
MARGIN = 0.05
"""Part of a time by which another must be less, at the least, to be called faster."""
_FORMS = (AS_BUILT, ONE_BLOCK, DENSE)
_WHOLE = (AS_BUILT, TUNED, CHANNELS_LAST, POINTWISE)


def is_faster(one: Timing, than: Timing) -> bool:
    """Return whether a time is clearly less than another: by more than :data:`MARGIN`, and than either's runs differ.

    Example::

        >>> is_faster(Timing(90, 0.01), Timing(100, 0.01)), is_faster(Timing(90, 0.2), Timing(100, 0.01))
        (True, False)
    """
    return one.nanoseconds < than.nanoseconds * (1 - max(MARGIN, one.spread, than.spread))


@dataclass(frozen=True)
class LayerForms:
    """What a factorized layer takes in each form, in all of its calls in a run.

    Args:
        folding: of the layer.
        num_slices: of the layer as it is built.
        rank: of a slice.
        times: form -> time; always of the layer as it is built.

    Example::

        >>> times = {"as built": Timing(100, 0.0), "one block": Timing(80, 0.0), "dense": Timing(98, 0.0)}
        >>> layer = LayerForms("kernel_in_encoder", 4, 8, times)
        >>> layer.chosen, layer.structure("one block")
        ('one block', (1, 32))
    """

    folding: str
    num_slices: int
    rank: int
    times: Mapping[str, Timing]

    @property
    def chosen(self) -> str:
        """The fastest form; as built unless another is clearly faster."""
        faster = [form for form, time in self.times.items() if is_faster(time, self.times[AS_BUILT])]
        return min(faster, key=lambda form: self.times[form].nanoseconds, default=AS_BUILT)

    def structure(self, form: str) -> tuple[int, int] | None:
        """Return slices and rank of the layer in a form; None: it is dense."""
        built = self.num_slices, self.rank
        return {AS_BUILT: built, ONE_BLOCK: (1, self.num_slices * self.rank), DENSE: None}[form]


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what is chosen by it. Printed, it is a table.

    Args:
        layers: name -> times of its forms.
        whole: ``as built`` -> time of the model; so ``tuned``, where a layer has a faster form, ``channels_last``,
            where the model has convolutions of images that are not yet so, and ``pointwise``, where
            :func:`~lr_callback.pointwise_` would change it.
        skipped: name of a factorized layer that was not measured -> why.
        inputs: shape and dtype of each tensor that the model was called with.
        device: what the times are of.

    Example::

        >>> tuning = Tuning({}, {"as built": Timing(5_000_000, 0.01), "channels_last": Timing(4_000_000, 0.01)})
        >>> tuning.changed, tuning.channels_last_is_faster
        ({}, True)
    """

    layers: Mapping[str, LayerForms]
    whole: Mapping[str, Timing]
    skipped: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    device: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, str]:
        """Name of each layer that :func:`~lr_callback.tune_` replaces -> its form.

        None, where the whole model turned out to be slower with what is faster alone.
        """
        tuned = self.whole.get(TUNED)
        if tuned is None or is_faster(self.whole[AS_BUILT], tuned):
            return {}
        return {name: layer.chosen for name, layer in self.layers.items() if layer.chosen != AS_BUILT}

    @property
    def time(self) -> Timing:
        """What the model takes with what is chosen, in the memory format that it has."""
        return self.whole[TUNED if self.changed else AS_BUILT]

    @property
    def channels_last_is_faster(self) -> bool:
        """Whether the model is clearly faster with its weights and inputs in ``channels_last``."""
        return self._is_faster(CHANNELS_LAST)

    @property
    def pointwise_is_faster(self) -> bool:
        """Whether the model is clearly faster after :func:`~lr_callback.pointwise_`."""
        return self._is_faster(POINTWISE)

    def _is_faster(self, way: str) -> bool:
        time = self.whole.get(way)
        return time is not None and is_faster(time, self.time)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        layers = {
            name: {
                "folding": layer.folding,
                "num_slices": layer.num_slices,
                "rank": layer.rank,
                "times": _plain(layer.times),
                "chosen": layer.chosen,
            }
            for name, layer in self.layers.items()
        }
        described = {"skipped": dict(self.skipped), "inputs": list(self.inputs), "device": dict(self.device)}
        return {"layers": layers, "whole": _plain(self.whole), "changed": self.changed, **described}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Tuning:
        """Read what :meth:`to_dict` wrote; what is chosen follows from the times.

        Raises:
            ValueError: If a part is missing, or of another kind.
        """
        kinds = {"layers": dict, "whole": dict, "skipped": dict, "inputs": list, "device": dict}
        parts = check_fields(written, kinds, "Tuning")
        layers = {name: _read_layer(f"Tuning: layer {name!r}", one) for name, one in parts["layers"].items()}
        whole = _read("Tuning: `whole`", parts["whole"], _WHOLE)
        return cls(layers, whole, parts["skipped"], tuple(parts["inputs"]), parts["device"])

    def to_json(self, path: str | Path | None = None) -> str:
        """Return it as JSON text.

        Args:
            path: of a file to write the text to.
        """
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Tuning:
        """Read JSON text, or a file of it.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not what :meth:`to_json` writes.
        """
        written = read_json(source, "Tuning")
        if not isinstance(written, dict):
            raise ValueError(f"Tuning: must be what `Tuning.to_json()` writes, found a {type(written).__name__}.")
        return cls.from_dict(written)

    def __str__(self) -> str:
        """Return the table, of at most :data:`~lr_callback.common.table.WIDTH` characters, and what follows from it."""
        skipped = [wrap(f"{readable(name)} stays as built: {reason}") for name, reason in self.skipped.items()]
        parts = [_layers_table(self.layers), *skipped, "", _whole_table(self.whole), "", *map(wrap, self._verdict())]
        return "\n".join(parts)

    def _verdict(self) -> list[str]:
        """Say what is faster, and plainly that nothing is."""
        lines = [self._of_layers()]
        if CHANNELS_LAST in self.whole:
            told = "faster" if self.channels_last_is_faster else "not clearly faster"
            lines.append(f"In channels_last, weights and inputs, the model is {told}.")
        if POINTWISE in self.whole:
            told = "faster" if self.pointwise_is_faster else "not clearly faster"
            lines.append(f"With its Linear layers as convolutions of one pixel, `pointwise_(model)`, it is {told}.")
        return lines

    def _of_layers(self) -> str:
        count = f"{len(self.changed)} of {len(self.layers)} factorized layers"
        if not self.changed:
            slower = "With the forms that are faster alone the model is slower" if TUNED in self.whole else ""
            return f"{slower or 'No other form of a layer is clearly faster'}: the layers stay as they were built."
        if not is_faster(self.time, self.whole[AS_BUILT]):
            return f"{count} are faster in another form; the whole model is not clearly faster with them."
        built, tuned = (one.nanoseconds / 1e6 for one in (self.whole[AS_BUILT], self.time))
        return f"{count} are faster in another form: {tuned:.4g} ms in place of {built:.4g} ms for the whole model."


def _plain(times: Mapping[str, Timing]) -> dict[str, list[float]]:
    return {form: [one.nanoseconds, one.spread] for form, one in times.items()}


def _read_layer(where: str, written: object) -> LayerForms:
    if not isinstance(written, dict):
        raise ValueError(f"{where}: must be a dict, got {type(written).__name__}.")
    parts = check_fields(written, {"folding": str, "num_slices": int, "rank": int, "times": dict}, where)
    return LayerForms(**{**parts, "times": _read(where, parts["times"], _FORMS)})


def _read(where: str, written: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Timing]:
    """Read times; that of what is built must be among them."""
    if AS_BUILT not in written or not set(written) <= set(known) or not all(map(_is_time, written.values())):
        raise ValueError(
            f"{where}: must give nanoseconds, from 1, and their spread for {AS_BUILT!r} and any of {list(known[1:])}, "
            f"found {str(dict(written))[:100]}; measure again with `tune`."
        )
    return {form: Timing(*written[form]) for form in known if form in written}


def _is_time(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    nanoseconds, spread = value
    return type(nanoseconds) is int and nanoseconds > 0 and type(spread) in (int, float) and spread >= 0


def _layers_table(layers: Mapping[str, LayerForms]) -> str:
    header = ["layer", "slices", "rank", *(f"{form}, ms" for form in _FORMS), "chosen"]
    rows = [
        [
            readable(name),
            str(layer.num_slices),
            str(layer.rank),
            *(_milliseconds(layer.times.get(form)) for form in _FORMS),
            layer.chosen,
        ]
        for name, layer in layers.items()
    ]
    others = [max(len(line[column]) for line in [header, *rows]) for column in range(1, len(header))]
    width = WIDTH - sum(others) - 2 * len(others)
    return align(header, [[shorten(name, width), *cells] for name, *cells in rows], right=frozenset(range(1, 6)))


def _whole_table(whole: Mapping[str, Timing]) -> str:
    built = whole[AS_BUILT].nanoseconds
    rows = [
        [form, _milliseconds(one), f"{one.nanoseconds / built:.1%}", f"{one.spread:.1%}"] for form, one in whole.items()
    ]
    return align(["whole model", "ms", "of as built", "spread"], rows, right=frozenset({1, 2, 3}))


def _milliseconds(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.nanoseconds / 1e6:.4f}"
