"""Packages: ``lightning`` and ``pytorch_lightning`` hold the same classes twice; a callback here serves both.

An ``isinstance`` check against a class of one package says nothing about an object of the other's. So what is asked of
a Trainer's callbacks is asked by the name of their class.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import new_class
from typing import TYPE_CHECKING

PACKAGES = ("lightning", "pytorch_lightning")
"""Names of the packages with Lightning's classes."""


def is_a(value: object, name: str) -> bool:
    """Return whether a value is of a class of this name in either package, or of a class derived from it.

    Example::

        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> class Mine(ModelCheckpoint): ...
        >>> is_a(Mine(), "ModelCheckpoint"), is_a(Mine(), "EarlyStopping")
        (True, False)
    """
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] in PACKAGES for kind in type(value).__mro__)


def callbacks_of(trainer: Trainer) -> list[object]:
    """Return the callbacks of a Trainer of either package; the attribute is not declared in its class."""
    return list(getattr(trainer, "callbacks", ()))


def _callback_classes() -> tuple[type, ...]:
    """Return the class ``Callback`` of `lightning`, and of `pytorch_lightning` if somebody has imported it."""
    # Importing it here would send the messages of `lightning` to the other's logger.
    imported = ["lightning.pytorch", *(["pytorch_lightning"] if "pytorch_lightning" in sys.modules else [])]
    modules = [import_module(name) for name in imported]
    return tuple(module.Callback for module in modules if hasattr(module, "Callback"))


if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    CallbackBase = Callback
else:
    # A Trainer takes a callback of either package; a LightningCLI asks for a subclass of its own package's class.
    CallbackBase = new_class("CallbackBase", _callback_classes())
    CallbackBase.__module__ = __name__


def serve_imported_packages() -> None:
    """Let the callback be one of each package that was imported by now, too."""
    bases = _callback_classes()
    if CallbackBase.__bases__ != bases:
        CallbackBase.__bases__ = bases
