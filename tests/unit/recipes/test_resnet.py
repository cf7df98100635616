from pathlib import Path

import pytest
import torch
from torch import nn

from lr_callback.recipes import CIFAR10Data, CifarResNet


def expected_keys(blocks: int) -> set[str]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{name}" for name in norm}
    for stage in (1, 2, 3):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            keys |= {f"{prefix}.conv{i}.weight" for i in (1, 2)}
            keys |= {f"{prefix}.bn{i}.{name}" for i in (1, 2) for name in norm}
    return keys


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (20, 3), (56, 9)])
def test_state_dict_has_the_published_keys_and_no_others(depth: int, blocks: int) -> None:
    assert set(CifarResNet(depth).state_dict()) == expected_keys(blocks)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameter_counts_are_those_of_the_paper(depth: int, millions: float) -> None:
    count = sum(p.numel() for p in CifarResNet(depth).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("in_channels", "size"), [(3, 32), (1, 8), (1, 9)])
def test_scores_of_any_image_size(in_channels: int, size: int) -> None:
    network = CifarResNet(8, num_classes=7, in_channels=in_channels, width=4)
    assert network(torch.zeros(2, in_channels, size, size)).shape == (2, 7)


def test_stages_double_the_channels_and_halve_the_image() -> None:
    network = CifarResNet(8, width=5)
    x = torch.zeros(1, 5, 16, 16)
    shapes = []
    for stage in (network.layer1, network.layer2, network.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(5, 16, 16), (10, 8, 8), (20, 4, 4)]


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    network = CifarResNet(8, width=4)
    block = network.layer2[0]
    assert isinstance(block, nn.Module)
    nn.init.zeros_(block.get_submodule("bn2").get_parameter("weight"))  # the residual branch then adds nothing
    x = torch.rand(2, 4, 6, 6)
    out = block.eval()(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize(("depth", "nearest"), [(21, 20), (2, 8), (-4, 8), (18, 20), (57, 56)])
def test_depth_that_is_not_6n_plus_2_is_refused(depth: int, nearest: int) -> None:
    message = rf"CifarResNet: `depth` must be 6n \+ 2 with n >= 1, got {depth}; nearest: {nearest}\."
    with pytest.raises(ValueError, match=message):
        CifarResNet(depth)


def test_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    source = CifarResNet(8, width=4)
    torch.save(source.state_dict(), tmp_path / "net.pt")
    loaded = CifarResNet(8, width=4, weights=tmp_path / "net.pt").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(CifarResNet(14, width=4).state_dict(), tmp_path / "net.pt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.1\.conv1\.weight"):
        CifarResNet(8, width=4, weights=tmp_path / "net.pt")


def test_missing_weights_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        CifarResNet(8, weights="nowhere.pt")


def test_published_resnet56_fits(real_data: Path) -> None:
    published = torch.load(real_data / "cifar10_resnet56.pt", weights_only=True)
    loaded = CifarResNet(56, weights=real_data / "cifar10_resnet56.pt").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in published.items())


def test_published_resnet20_reaches_its_published_accuracy(real_data: Path) -> None:
    network = CifarResNet(20, weights=real_data / "cifar10_resnet20.pt").eval()
    data = CIFAR10Data(real_data, batch_size=500)
    data.setup("test")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    with torch.inference_mode():
        right = sum(
            int((network(images.to(device)).argmax(1).cpu() == labels).sum())
            for images, labels in data.test_dataloader()
        )
    # On a GPU another summation order may turn an image or two that lie on the decision boundary.
    assert right == 9173 if device == "cpu" else abs(right - 9173) <= 5
