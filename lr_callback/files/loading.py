"""Loading: ``load_from_checkpoint`` of a LightningModule, whatever the structure in the file.

Lightning makes the module and then loads the file's weights; between the two the module must take the file's structure.
Either its class does so by itself (:class:`LowRankMixin`), or the helper lets it for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import IO, TYPE_CHECKING, TypeVar

from torch import nn

from lr_callback.files.hook import install_hook

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE
    from lightning.pytorch import LightningModule

Loaded = TypeVar("Loaded", bound="LightningModule")
_LOCK = RLock()
_METHOD = "load_state_dict"


class LowRankMixin:
    """Let a module take the structure of any state dict that is loaded into it, without any callback.

    For a LightningModule, so that its own ``load_from_checkpoint`` reads files from before and after a compression;
    works for any ``nn.Module``. It must come first among the bases.

    Raises:
        TypeError: If it does not come before ``nn.Module`` among the bases of a class.

    Example::

        >>> from lr_callback import allocate, factorize_
        >>> class Network(LowRankMixin, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(64, 64)
        >>> trained, fresh = Network(), Network()
        >>> _ = factorize_(trained, allocate(trained, keep_ratio=0.5))
        >>> fresh.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> type(fresh.layer).__name__
        'FactorizedLinear'
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        if nn.Module in order and order.index(nn.Module) < order.index(LowRankMixin):
            raise TypeError(
                f"LowRankMixin must come first among the bases of {cls.__name__}, found "
                f"({', '.join(base.__name__ for base in cls.__bases__)}): its `__init__` would never be called. "
                f"Write `class {cls.__name__}(LowRankMixin, ...)`."
            )

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)
        if not isinstance(self, nn.Module):
            raise TypeError(f"LowRankMixin: {type(self).__name__} must be an nn.Module as well; add it to the bases.")
        install_hook(self)


def load_from_checkpoint(
    cls: type[Loaded],
    checkpoint_path: str | Path | IO[bytes],
    *,
    map_location: _MAP_LOCATION_TYPE = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    weights_only: bool = True,
    **kwargs: object,
) -> Loaded:
    """Make a LightningModule from a checkpoint of before or after a compression.

    It is ``cls.load_from_checkpoint``, which alone raises "Missing key(s) in state_dict" where the structure in the
    file is not the one that ``cls`` makes. The module keeps the ability to take other structures later.

    Args:
        cls: the LightningModule's class, or a base of the one that LightningCLI wrote into the file.
        checkpoint_path: a file that Lightning wrote.
        map_location: as in ``cls.load_from_checkpoint``.
        hparams_file: as in ``cls.load_from_checkpoint``.
        strict: as in ``cls.load_from_checkpoint``.
        weights_only: read tensors and plain data only, and unpickle nothing. Lightning's own default reads files from
            the web otherwise.
        **kwargs: arguments of ``cls`` that are not in the file, or other than there.

    Raises:
        TypeError: If ``cls`` is no LightningModule.

    Example::

        model = lr_callback.load_from_checkpoint(Classifier, "last.ckpt")
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module) or not hasattr(cls, "load_from_checkpoint"):
        name = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        raise TypeError(
            f"`cls` must be a LightningModule's class, got {name}. For another model use "
            "`lr_callback.restore_(model, path)`."
        )
    with _adapting(cls):
        return cls.load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=weights_only, **kwargs
        )


@contextmanager
def _adapting(cls: type[nn.Module]) -> Iterator[None]:
    """Let modules of a class take the structure of what they load.

    The file names a subclass where LightningCLI wrote it, and Lightning takes no class made here instead of it; so it
    is the class's own method that is replaced for the time of one call.
    """
    with _LOCK:
        own = vars(cls).get(_METHOD)
        inherited: Callable[..., object] = getattr(cls, _METHOD)

        def load_state_dict(self: nn.Module, *arguments: object, **named: object) -> object:
            install_hook(self)
            return inherited(self, *arguments, **named)

        setattr(cls, _METHOD, load_state_dict)
        try:
            yield
        finally:
            if own is None:
                delattr(cls, _METHOD)
            else:
                setattr(cls, _METHOD, own)
