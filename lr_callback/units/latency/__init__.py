"""Latency: what a model's layers take on this device, dense and factorized, measured."""

from lr_callback.units.latency.bench import Bench
from lr_callback.units.latency.curves import Curve, LayerTimes, MeasuredCost
from lr_callback.units.latency.files import device_facts, folder
from lr_callback.units.latency.inputs import LayerInput
from lr_callback.units.latency.measure import Latencies, Progress, Wanted, check_clock, measure
from lr_callback.units.latency.timing import Stopwatch, Timing, timed, timed_in_turns, timed_runs
from lr_callback.units.latency.trust import Doubt, NoisyClockError, compared, drift, excess, told

__all__ = [
    "Bench",
    "Curve",
    "Doubt",
    "Latencies",
    "LayerInput",
    "LayerTimes",
    "MeasuredCost",
    "NoisyClockError",
    "Progress",
    "Stopwatch",
    "Timing",
    "Wanted",
    "check_clock",
    "compared",
    "device_facts",
    "drift",
    "excess",
    "folder",
    "measure",
    "timed",
    "timed_in_turns",
    "timed_runs",
    "told",
]
