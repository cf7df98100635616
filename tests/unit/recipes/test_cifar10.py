import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from lr_callback.recipes import CIFAR10Data
from lr_callback.recipes._images import ImageTensors

Pixels = NDArray[np.uint8]


def random_images(count: int, seed: int) -> tuple[Pixels, Pixels]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.permutation(np.arange(count) % 10).astype("u1")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write the form with PNG files: 200 training and 50 test images."""
    (train, train_labels), (test, test_labels) = random_images(200, 1), random_images(50, 2)
    Image.fromarray(train.reshape(-1, 32, 3)).save(tmp_path / "cifar10_train8k_images.png")
    Image.fromarray(test.reshape(-1, 32, 3)).save(tmp_path / "cifar10_test_images.png")
    np.savez(tmp_path / "cifar10_labels.npz", test_labels=test_labels, train8k_labels=train_labels)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the same images in the official layout of pickled batches.

    torchvision compares the md5 sums of the real files, which no made-up file can have; only that check is switched
    off, and all the reading is torchvision's own.
    """
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    train, train_labels = random_images(200, 1)
    for i in range(5):
        write_batch(root / f"data_batch_{i + 1}", train[40 * i : 40 * i + 40], train_labels[40 * i : 40 * i + 40])
    write_batch(root / "test_batch", *random_images(50, 2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return tmp_path


def write_batch(path: Path, images: Pixels, labels: Pixels) -> None:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    path.write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))


def ready(data_dir: Path, **settings: Any) -> CIFAR10Data:
    data = CIFAR10Data(data_dir, **settings)
    data.prepare_data()
    data.setup()
    return data


def as_set(part: ImageTensors) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


def test_files_are_read_pixel_by_pixel(files: Path) -> None:
    pixels, labels = random_images(50, 2)
    data = ready(files, batch_size=50)
    images, targets = next(iter(data.test_dataloader()))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(pixels) / 255 - mean) / std
    assert torch.allclose(images.permute(0, 2, 3, 1), expected, atol=1e-6)
    assert targets.dtype == torch.int64 and targets.tolist() == labels.tolist()


def test_torchvision_folder_gives_the_same_images_as_the_files(folder: Path, files: Path) -> None:
    # Both fixtures write into one folder: the folder form wins, so the files are read once it is moved away.
    official = ready(files)
    (folder / "cifar-10-batches-py").rename(folder / "elsewhere")
    from_files = ready(files)
    for name in ("train_data", "val_data", "test_data"):
        assert torch.equal(getattr(official, name).images, getattr(from_files, name).images)
        assert torch.equal(getattr(official, name).labels, getattr(from_files, name).labels)


def test_validation_is_held_out_of_training(files: Path) -> None:
    data = ready(files)
    train, val = as_set(data.train_data), as_set(data.val_data)
    assert (len(train), len(val), len(data.test_data)) == (180, 20, 50)
    assert not train & val
    assert data.val_data.labels.bincount().tolist() == [2] * 10
    assert data.train_data.labels.bincount().tolist() == [18] * 10


def test_seed_alone_decides_the_validation_images(files: Path) -> None:
    torch.manual_seed(1)
    first = ready(files)
    torch.manual_seed(2)
    again, other = ready(files), ready(files, seed=1)
    assert torch.equal(first.val_data.images, again.val_data.images)
    assert as_set(first.val_data) != as_set(other.val_data)


def test_train_limit_keeps_classes_in_proportion_and_validation_as_it_is(files: Path) -> None:
    limited, full = ready(files, train_limit=50), ready(files, train_limit=1000)
    assert limited.train_data.labels.bincount().tolist() == [5] * 10
    assert as_set(limited.train_data) < as_set(full.train_data)
    assert len(full.train_data) == 180
    assert torch.equal(limited.val_data.images, full.val_data.images)


def test_augmentation_changes_training_images_only(files: Path) -> None:
    data, some = ready(files), list(range(20))
    assert not torch.equal(*(data.train_data.__getitems__(some)[0] for _ in range(2)))
    for part in (data.val_data, data.test_data, ready(files, augment=False).train_data):
        assert torch.equal(part.__getitems__(some)[0], part.__getitems__(some)[0])


def test_each_training_image_is_a_crop_of_itself_padded_with_black_perhaps_mirrored(files: Path) -> None:
    data = ready(files).train_data
    seen = set()
    for _ in range(5):
        images, labels = data.__getitems__(list(range(len(data))))
        assert torch.equal(labels, data.labels)
        pixels = ((images * data.std + data.mean) * 255).round().to(torch.uint8)
        seen |= {find_crop(source, crop) for source, crop in zip(data.images, pixels, strict=True)}
    assert {mirrored for _, _, mirrored in seen} == {True, False}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))


def find_crop(source: torch.Tensor, crop: torch.Tensor) -> tuple[int, int, bool]:
    """Return the crop's offset and whether it is mirrored; random pixels make the answer unique."""
    padded = torch.nn.functional.pad(source, (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
    for mirrored, candidate in ((False, crop), (True, crop.flip(2))):
        hits = (windows == candidate).flatten(2).all(dim=2).nonzero().tolist()
        if hits:
            return hits[0][0], hits[0][1], mirrored
    raise AssertionError("the training image is no crop of its source")


def test_setup_loads_only_what_a_stage_needs(files: Path) -> None:
    data = CIFAR10Data(files)
    data.setup("test")
    assert len(data.test_data) == 50 and not hasattr(data, "train_data")


def test_empty_folder_is_named_with_what_belongs_there(tmp_path: Path) -> None:
    data = CIFAR10Data(tmp_path / "nothing")
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"folder cifar-10-batches-py, or the files .*nothing.*download=True"):
        data.setup()


def test_damaged_folder_is_reported_by_torchvision(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        CIFAR10Data(tmp_path).setup("test")


def test_png_that_does_not_match_its_labels_is_refused(files: Path) -> None:
    Image.new("RGB", (32, 320)).save(files / "cifar10_test_images.png")
    with pytest.raises(ValueError, match=r"cifar10_test_images\.png must be .* 1600 pixels high .*\(320, 32, 3\)"):
        CIFAR10Data(files).setup("test")


def test_download_is_asked_of_torchvision_only_when_nothing_is_there(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: fetched.append(str(self.root)))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    CIFAR10Data(files, download=True).prepare_data()
    CIFAR10Data(tmp_path / "empty").prepare_data()
    assert fetched == []
    # torchvision goes on to read what this test did not fetch.
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        CIFAR10Data(tmp_path / "empty", download=True).prepare_data()
    assert fetched == [str(tmp_path / "empty")]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_impossible_val_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"`val_fraction` must be above 0 and below 1, got {fraction}"):
        CIFAR10Data("data", val_fraction=fraction)


def test_impossible_train_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="`train_limit` must be at least 1, got 0"):
        CIFAR10Data("data", train_limit=0)


def test_the_real_files(real_data: Path) -> None:
    data = CIFAR10Data(real_data)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (7200, 800, 10000)
    assert data.test_data.labels.bincount().tolist() == [1000] * 10
    assert data.val_data.labels.bincount().tolist() == [80] * 10
