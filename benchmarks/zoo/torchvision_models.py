"""Every model that torchvision lists, with small inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.zoo.case import Case

_SIZES = {"maxvit_t": 224, "inception_v3": 299, "quantized_inception_v3": 299, "vit_h_14": 56}
"""Edge of the images of models that do not take 64."""

_GIANTS = {"regnet_y_128gf", "vit_h_14"}

_SAMPLES = dict.fromkeys(("s3d", "mvit_v1_b", "mvit_v2_s"), (3, 16, 224, 224))
"""Shapes of a clip for video models that do not take 8 frames of 64 x 64."""


def cases() -> list[Case]:
    """List the cases."""
    return [
        *(_images(name, 2) for name in models.list_models(models)),
        *(_images(name, 2) for name in _listed("quantization")),
        *(_images(name, 2, weights_backbone=None) for name in _listed("segmentation")),
        *(_detection(name) for name in _listed("detection")),
        *(_clips(name) for name in _listed("video")),
        *(_flow(name) for name in _listed("optical_flow")),
    ]


def _random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _make(name: str, **settings: object) -> nn.Module:
    made: nn.Module = models.get_model(name, weights=None, **settings)
    return made


def _images(name: str, batch: int, **settings: object) -> Case:
    size = _SIZES.get(name, 64)
    if name.startswith("vit_"):
        settings["image_size"] = size
    make = partial(_make, name, **settings, **_quiet(name))
    return Case(name, "torchvision", make, lambda: (_random(batch, 3, size, size),), giant=name in _GIANTS)


def _quiet(name: str) -> dict[str, Any]:
    """Return what the two oldest models warn about where it is not said; it is what they do anyway."""
    return {"init_weights": True} if "inception" in name or "googlenet" in name else {}


def _clips(name: str) -> Case:
    sample = _SAMPLES.get(name, (3, 8, 64, 64))
    return Case(name, "torchvision", partial(_make, name), lambda: (_random(2, *sample),))


def _flow(name: str) -> Case:
    return Case(name, "torchvision", partial(_make, name), lambda: (_random(2, 3, 128, 128), _random(2, 3, 128, 128)))


def _detection(name: str) -> Case:
    fixed = name.startswith("ssd")
    settings = {} if fixed else {"min_size": 128, "max_size": 160}
    return Case(
        name,
        "torchvision",
        partial(_make, name, weights_backbone=None, **settings),
        lambda: ([_random(3, 128, 144)],),
        lambda: _targets(name, 128, 144),
        selects=True,
    )


def _targets(name: str, height: int, width: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images, one upright, with a box each and what else a model is trained on."""
    images = [_random(3, height, width), _random(3, width, height)]
    targets: list[dict[str, Tensor]] = []
    for image in images:
        target = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]), "labels": torch.tensor([1])}
        if name.startswith("mask"):
            target["masks"] = torch.ones(1, *image.shape[1:], dtype=torch.uint8)
        if name.startswith("keypoint"):
            target["keypoints"] = torch.tensor([[[30.0, 40.0, 1.0]] * 17])
        targets.append(target)
    return images, targets


def standard(name: str, batch: int) -> Case:
    """Return a model as it is used: its own settings, and a batch of inputs of the size that its weights were made for.

    Detection models get images of 640 x 480, and scale them themselves; video models get clips of 16 frames.
    """
    backbone = {"weights_backbone": None} if name in (*_listed("segmentation"), *_listed("detection")) else {}
    make = partial(_make, name, **backbone, **_quiet(name))
    if name in _listed("detection"):
        images, targets = _targets(name, 480, 640)
        return Case(name, "torchvision", make, lambda: ([images[0]] * batch, [targets[0]] * batch))
    shapes = [(3, 368, 496)] * 2 if name in _listed("optical_flow") else [_standard_shape(name)]
    return Case(name, "torchvision", make, lambda: tuple(_random(batch, *shape) for shape in shapes))


def _listed(group: str) -> list[str]:
    return models.list_models(getattr(models, group))


def _standard_shape(name: str) -> tuple[int, ...]:
    """Return the shape of an input as a model's weights describe it."""
    if name.startswith("vit_"):
        return 3, 224, 224  # the best weights of some are for larger images, which only they build the model for
    preset = models.get_model_weights(name).DEFAULT.transforms()
    edges = preset.resize_size if name in _listed("segmentation") else preset.crop_size
    height, width = edges if len(edges) == 2 else (*edges, *edges)
    return (3, 16, height, width) if name in _listed("video") else (3, height, width)
