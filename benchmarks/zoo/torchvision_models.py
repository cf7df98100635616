"""Every model that torchvision lists, with small inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.zoo.case import Arguments, Case

_SIZES = {"maxvit_t": 224, "inception_v3": 80, "quantized_inception_v3": 80, "vit_h_14": 56}
"""Edge of the images of models that do not take 64."""

_GIANTS = {"regnet_y_128gf", "vit_h_14"}

_SAMPLES: dict[str, tuple[int, ...]] = {
    "s3d": (3, 16, 200, 200),
    "mvit_v1_b": (3, 4, 64, 64),
    "mvit_v2_s": (3, 4, 64, 64),
}
"""Shapes of a clip for video models that do not take 8 frames of 64 x 64."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "mvit_v1_b": {"spatial_size": (64, 64), "temporal_size": 4},
    "mvit_v2_s": {"spatial_size": (64, 64), "temporal_size": 4},
}


def cases() -> list[Case]:
    """List the cases."""
    return [
        *(_images(name, 2) for name in models.list_models(models)),
        *(_images(name, 2) for name in models.list_models(models.quantization)),
        *(_images(name, 2, weights_backbone=None) for name in models.list_models(models.segmentation)),
        *(_detection(name) for name in models.list_models(models.detection)),
        *(_clips(name) for name in models.list_models(models.video)),
        *(_flow(name) for name in models.list_models(models.optical_flow)),
    ]


def _random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _make(name: str, **settings: Any) -> nn.Module:
    made: nn.Module = models.get_model(name, weights=None, **settings)
    return made


def _images(name: str, batch: int, **settings: Any) -> Case:
    size = _SIZES.get(name, 64)
    if name.startswith("vit_"):
        settings["image_size"] = size
    if "inception" in name or "googlenet" in name:
        settings["init_weights"] = True  # what the models do anyway; they warn where nothing is said
    make = partial(_make, name, **settings, **_SETTINGS.get(name, {}))
    return Case(name, "torchvision", make, lambda: (_random(batch, 3, size, size),), giant=name in _GIANTS)


def _clips(name: str) -> Case:
    sample = _SAMPLES.get(name, (3, 8, 64, 64))
    return Case(name, "torchvision", partial(_make, name, **_SETTINGS.get(name, {})), lambda: (_random(2, *sample),))


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
        lambda: _targets(name),
    )


def _targets(name: str) -> Arguments:
    """Return two images with one box each, and what else a model is trained on."""
    images = [_random(3, 128, 144), _random(3, 144, 128)]
    targets: list[dict[str, Tensor]] = []
    for image in images:
        target = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]), "labels": torch.tensor([1])}
        if name.startswith("mask"):
            target["masks"] = torch.ones(1, *image.shape[1:], dtype=torch.uint8)
        if name.startswith("keypoint"):
            target["keypoints"] = torch.tensor([[[30.0, 40.0, 1.0]] * 17])
        targets.append(target)
    return images, targets
