import gzip
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from stochastic_depth.cli import data, fashion_mnist
from stochastic_depth.cli.batches import EpochOrder, evaluation_batches, training_batches
from stochastic_depth.cli.errors import CommandError


def draw(folder: Path, count: int, shade: int = 128) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (20, 16), (shade, index, 255 - index)).save(folder / f"{index:02}.png")


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    draw(tmp_path / "cat", 20)
    draw(tmp_path / "dog", 40)
    return tmp_path


def files(images: torch.utils.data.Subset) -> list[str]:
    return [images.dataset.samples[index][0] for index in images.indices]


def test_a_plain_folder_is_split_by_class_and_the_same_way_every_time(animals):
    first, second = data.load(str(animals)), data.load(str(animals))
    assert first.classes == ("cat", "dog")
    parts = [files(part) for part in (first.train, first.val, first.test)]
    assert parts == [files(part) for part in (second.train, second.val, second.test)]
    everything = [path for part in parts for path in part]
    assert len(everything) == len(set(everything)) == 60
    cats = [sum("cat" in path for path in part) for part in parts]
    assert cats == [14, 3, 3]
    assert [len(part) for part in parts] == [43, 9, 8]


def test_given_splits_are_used_as_they_are(tmp_path):
    for part, count in (("train", 5), ("valid", 3), ("test", 2)):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name, count)
    splits = data.load(str(tmp_path))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [10, 6, 4]
    assert {Path(path).parts[-3] for path in files(splits.val)} == {"valid"}


def test_a_missing_validation_split_comes_out_of_the_training_images_only(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name, count)
    splits = data.load(str(tmp_path))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 4, 6]
    assert not set(files(splits.train)) & set(files(splits.val))


def test_quick_limits_every_split(animals, monkeypatch):
    monkeypatch.setattr(data, "QUICK_IMAGES", 5)
    splits = data.load(str(animals), quick=True)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5, 5, 5]


def test_unreadable_images_are_skipped_and_named(animals):
    (animals / "cat" / "03.png").write_bytes(b"not an image")
    whole = (animals / "dog" / "07.png").read_bytes()
    (animals / "dog" / "07.png").write_bytes(whole[: len(whole) // 2])
    splits = data.load(str(animals))
    assert len(splits.unreadable) == 2
    assert str(animals / "cat" / "03.png") in splits.unreadable[0]
    assert str(animals / "dog" / "07.png") in splits.unreadable[1]
    kept = files(splits.train) + files(splits.val) + files(splits.test)
    assert len(kept) == 58
    assert not any(path.endswith(("cat/03.png", "dog/07.png")) for path in kept)


def test_only_unreadable_images_are_an_error(animals):
    for path in animals.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(CommandError, match=r"--data .*none of its 60 images can be read"):
        data.load(str(animals))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has no folders; put the images of each class into a folder"),
        ({"cat": 3}, "needs two classes or more"),
        ({"cat": 3, "dog": 0}, "no images in dog; images are files that end with .jpg"),
        ({"cat": 1, "dog": 1}, "too few images to leave some for 'val'"),
        (
            {"train/cat": 3, "train/dog": 3, "val/cat": 3, "val/cow": 3},
            "only one of them has cow, dog",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, layout, message):
    for name, count in layout.items():
        draw(tmp_path / name, count)
    with pytest.raises(CommandError, match=f"(?i)--data {tmp_path}.*{message}"):
        data.load(str(tmp_path))


def test_no_batch_is_much_smaller_than_the_others():
    for count, batch_size in ((87, 32), (33, 32), (5, 32), (64, 32), (100, 1)):
        sizes = EpochOrder(count, batch_size, 0).sizes
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        assert len(sizes) == -(-count // batch_size)
    for devices in (2, 3):
        sizes = EpochOrder(87, 36, 0, devices).sizes
        assert sum(sizes) == 87 - 87 % devices
        assert all(size % devices == 0 for size in sizes)


def test_hidden_folders_are_skipped_and_ignored_files_named(animals):
    (animals / ".ipynb_checkpoints").mkdir()
    (animals / "__MACOSX").mkdir()
    (animals / "cat" / ".hidden.png").write_bytes(b"")
    (animals / "cat" / "moving.gif").write_bytes(b"GIF89a")
    splits = data.load(str(animals))
    assert splits.classes == ("cat", "dog")
    assert splits.ignored == (str(animals / "cat" / "moving.gif"),)
    assert splits.unreadable == splits.warnings == ()


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        *((mode, (20, 16)) for mode in ("RGBA", "P", "L", "I;16")),
        ("RGB", (1, 1)),
        ("RGB", (3, 900)),
    ],
)
def test_images_of_every_kind(tmp_path, mode, size):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new(mode, size).save(tmp_path / name / f"{index}.png")
    splits = data.load(str(tmp_path))
    for batches in (
        training_batches(splits.train, 16, 8, 0),
        evaluation_batches(splits.val, 16, 8),
    ):
        for images, _ in batches:
            assert images.shape[1:] == (3, 16, 16)
            assert images.dtype == torch.uint8


def test_a_class_that_is_too_small_is_warned_about(tmp_path):
    draw(tmp_path / "cat", 20)
    draw(tmp_path / "dog", 1)
    draw(tmp_path / "cow", 4)
    cow, dog = data.load(str(tmp_path)).warnings
    assert cow == "class 'cow' is small: 2 training, 1 validation and 1 test images"
    assert dog == "class 'dog' is small: 1 training, 0 validation and 0 test images"


def test_wrong_labels_are_exactly_as_many_and_those_of_other_classes(animals):
    images = data.load(str(animals)).train
    labels = data.labels_of(images)
    assert labels == [images[index][1] for index in range(len(images))]
    noisy = data.with_wrong_labels(images, 0.4, 2, seed=0)
    given = [noisy[index][1] for index in range(len(noisy))]
    assert sum(a != b for a, b in zip(labels, given, strict=True)) == round(0.4 * 43)
    assert set(given) == {0, 1}
    again = data.with_wrong_labels(images, 0.4, 2, seed=0)
    assert again.labels == noisy.labels
    assert data.with_wrong_labels(images, 0.4, 2, seed=1).labels != noisy.labels
    assert data.with_wrong_labels(images, 0.0, 2, seed=0) is images
    assert noisy[3][0].tobytes() == images[3][0].tobytes()


def test_a_missing_folder(tmp_path):
    with pytest.raises(CommandError, match="no such folder; give a folder with one folder of"):
        data.load(str(tmp_path / "nowhere"))


def test_training_batches_depend_on_seed_and_epoch_alone(animals):
    splits = data.load(str(animals))

    def epoch(seed: int, number: int) -> torch.Tensor:
        batches = training_batches(splits.train, 16, 8, seed)
        batches.batch_sampler.set_epoch(number)
        torch.rand(number + 1)  # other draws must not matter
        return torch.cat([images for images, _ in batches])

    torch.manual_seed(0)
    reference = epoch(0, 0)
    assert reference.shape == (43, 3, 16, 16)  # every image, in each epoch
    assert reference.dtype == torch.uint8
    torch.manual_seed(1)
    assert torch.equal(epoch(0, 0), reference)
    assert not torch.equal(epoch(1, 0), reference)
    assert not torch.equal(epoch(0, 1), reference)


def on_each_rank(monkeypatch, make) -> list:
    """What ``make`` returns on each of two processes."""
    found = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found.append(make())
    monkeypatch.undo()
    return found


def test_two_devices_share_the_batches_and_see_what_one_would(animals, monkeypatch):
    images = data.load(str(animals)).train

    def batches(devices: int) -> list:
        return [images for images, _ in training_batches(images, 16, 8, 0, devices)]

    first, second = on_each_rank(monkeypatch, lambda: batches(2))
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    together = [torch.stack(parts, 1).flatten(0, 1) for parts in zip(first, second, strict=True)]
    assert max(len(batch) for batch in together) == 8
    alone = torch.cat(batches(1))
    assert torch.equal(torch.cat(together), alone[:42])  # the 43rd has no counterpart


def test_two_devices_evaluate_every_image_once_in_as_many_batches(animals, monkeypatch):
    images = data.load(str(animals)).train
    for count in range(2, 12):
        some = torch.utils.data.Subset(images, range(count))
        parts = on_each_rank(monkeypatch, lambda some=some: list(evaluation_batches(some, 16, 1)))
        assert len(parts[0]) == len(parts[1])
        together = [image for part in parts for batch, _ in part for image in batch]
        alone = [image for batch, _ in evaluation_batches(some, 16, 1) for image in batch]
        assert len(together) == count
        assert sorted(map(sum_of, together)) == sorted(map(sum_of, alone))


def sum_of(image: torch.Tensor) -> int:
    return int(image.long().sum())


def test_augmentation_leaves_the_global_generator_alone(animals):
    batches = training_batches(data.load(str(animals)).train, 16, 8, 0)
    image = batches.dataset
    before = torch.get_rng_state()
    image[(0, 123)]
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_sees_every_image_once(animals):
    splits = data.load(str(animals))
    labels = torch.cat([labels for _, labels in evaluation_batches(splits.val, 16, 1)])
    assert labels.bincount().tolist() == [3, 6]


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.numpy().tobytes())


def test_fashion_mnist_comes_from_debians_files(tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    for part, count in (("train", 30), ("t10k", 10)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        write_idx(packed / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(packed / f"{part}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "debian_package", lambda *args: packed)
    monkeypatch.setattr(fashion_mnist, "TRAINING_IMAGES", 12)
    monkeypatch.setattr(fashion_mnist, "VALIDATION_IMAGES", 11)
    monkeypatch.setattr(fashion_mnist, "TEST_IMAGES", 9)
    splits = data.load("fashion-mnist")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [12, 11, 9]
    assert len(fashion_mnist.load(15, 10)[0]) == 15
    assert fashion_mnist.load(15)[1].indices == splits.val.indices  # the same to choose on
    assert not set(splits.train.indices) & set(splits.val.indices)
    assert len(splits.classes) == 10
    assert splits.image_size == 32
    images, labels = next(iter(evaluation_batches(splits.test, 32, 4)))
    assert images.shape == (9, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.tolist() == data.labels_of(splits.test)

    monkeypatch.setattr(fashion_mnist, "debian_package", lambda *args: pytest.fail("fetched"))
    data.load("fashion-mnist")  # from the cache
