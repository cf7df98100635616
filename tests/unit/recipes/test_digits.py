import importlib
import sys
from typing import Any

import pytest
import torch

from lr_callback.recipes import DigitsData
from lr_callback.recipes._images import ImageTensors

pytest.importorskip("sklearn")


def ready(**settings: Any) -> DigitsData:
    data = DigitsData(**settings)
    data.setup()
    return data


def parts(data: DigitsData) -> list[ImageTensors]:
    return [data.train_data, data.val_data, data.test_data]


def as_set(part: ImageTensors) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


def test_split_sizes() -> None:
    assert [len(part) for part in parts(ready())] == [1258, 180, 359]
    assert [len(part) for part in parts(ready(val_fraction=0.25, test_fraction=0.25))] == [899, 449, 449]


def test_splits_are_disjoint_and_complete() -> None:
    train, val, test = (as_set(part) for part in parts(ready()))
    assert len(train) + len(val) + len(test) == 1797  # no image occurs twice in the data set
    assert not train & val and not train & test and not val & test


def test_every_class_is_split_in_proportion() -> None:
    data = ready()
    total = torch.cat([part.labels for part in parts(data)]).bincount()
    for part in parts(data):
        expected = total * len(part) / 1797
        assert (part.labels.bincount() - expected).abs().max() < 2


def test_seed_alone_decides_the_split() -> None:
    torch.manual_seed(1)
    first = ready(seed=3)
    torch.manual_seed(2)
    again, other = ready(seed=3), ready(seed=4)
    assert torch.equal(first.test_data.images, again.test_data.images)
    assert as_set(first.test_data) != as_set(other.test_data)


def test_images_are_grey_8_by_8_and_scaled() -> None:
    data = ready(augment=False)
    images = torch.cat([batch for batch, _ in data.train_dataloader()])
    assert images.shape == (1258, 1, 8, 8) and images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0.0, abs=0.02)
    assert images.std().item() == pytest.approx(1.0, abs=0.02)


def test_labels_belong_to_their_images() -> None:
    digits = importlib.import_module("sklearn.datasets").load_digits()
    truth = {
        image.astype("uint8").tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)
    }
    for part in parts(ready()):
        assert all(truth[i.numpy().tobytes()] == int(y) for i, y in zip(part.images, part.labels, strict=True))


def test_one_item_equals_its_place_in_a_batch() -> None:
    data = ready().test_data
    images, labels = data.__getitems__([4, 7])
    image, label = data[7]
    assert torch.equal(image, images[1]) and torch.equal(label, labels[1])


def test_augmentation_changes_training_images_only() -> None:
    data = ready()
    everything = list(range(100))
    train = [data.train_data.__getitems__(everything)[0] for _ in range(2)]
    assert not torch.equal(*train)
    for part in (data.val_data, data.test_data):
        assert torch.equal(part.__getitems__(everything)[0], part.__getitems__(everything)[0])
    plain = ready(augment=False).train_data
    assert torch.equal(plain.__getitems__(everything)[0], plain.__getitems__(everything)[0])


def test_augmentation_shifts_by_at_most_one_pixel() -> None:
    data = ready().train_data
    plain = ready(augment=False).train_data
    padded = torch.nn.functional.pad(plain.images, (1, 1, 1, 1))
    allowed = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    shifted = data.__getitems__(list(range(len(data))))[0]
    pixels = ((shifted * data.std + data.mean) * data.white).round()
    hits = (allowed == pixels).flatten(2).all(dim=2)
    assert hits.any(dim=0).all()
    assert hits.any(dim=1).all()  # each of the nine shifts occurs


def test_training_batches_are_shuffled_and_others_are_not() -> None:
    data = ready(augment=False)
    assert not torch.equal(next(iter(data.train_dataloader()))[1], data.train_data.labels[:64])
    assert torch.equal(next(iter(data.val_dataloader()))[1], data.val_data.labels[:64])
    assert torch.equal(next(iter(data.test_dataloader()))[1], data.test_data.labels[:64])


def test_worker_processes_give_the_same_images() -> None:
    data, parallel = ready(), ready(num_workers=1)
    here = torch.cat([images for images, _ in data.test_dataloader()])
    there = torch.cat([images for images, _ in parallel.test_dataloader()])
    assert torch.equal(here, there)


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.2), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2)])
def test_impossible_fractions_are_refused(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"must be above 0 and together below 1, got {val} and {test}; choose"):
        DigitsData(val_fraction=val, test_fraction=test)


def test_missing_scikit_learn_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lr_callback\[examples\]'"):
        DigitsData().setup()
