"""All cases of the zoo, by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from benchmarks.zoo import timm_models, torchvision_models, transformers_models
from benchmarks.zoo.case import Case

_SOURCES: tuple[Callable[[], list[Case]], ...] = (
    torchvision_models.cases,
    timm_models.cases,
    transformers_models.cases,
)


def catalogue() -> Mapping[str, Case]:
    """Return every case, those that take longest last."""
    cases = {case.key: case for source in _SOURCES for case in source()}
    return dict(sorted(cases.items(), key=lambda item: item[1].giant))


def chosen(only: str, shard: str, giants: bool) -> list[Case]:
    """Return the cases that match a pattern and are of a shard; see :func:`share`."""
    cases = catalogue()
    return [cases[key] for key in share([key for key in cases if giants or not cases[key].giant], only, shard)]


def share(keys: Sequence[str], only: str, shard: str) -> list[str]:
    """Return the keys that match a pattern and are of a shard, such as ``2/4``.

    Raises:
        ValueError: If the shard is not of this form.
    """
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"`shard` must be such as 2/4, got {shard!r}.")
    return [key for key in keys if fnmatchcase(key, only)][int(part) - 1 :: int(parts)]
