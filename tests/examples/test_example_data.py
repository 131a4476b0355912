"""Official file layouts, read from tiny synthetic files. Errors name the damaged file."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import batches as example_batches
import data
import numpy as np
import pytest
import readers
import torch
from faults import InputError
from PIL import Image
from torch import Tensor
from vision import import_torchvision


def cifar_records(count: int, label_bytes: int, classes: int) -> tuple[bytes, Tensor, Tensor]:
    """Return `count` records of the CIFAR binary version, and their images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (count, label_bytes), dtype=torch.uint8, generator=generator)
    table = torch.cat([labels, images.flatten(1)], dim=1)
    return table.numpy().tobytes(), images, labels[:, -1].long()


@pytest.mark.parametrize(("label_bytes", "classes"), [(1, 10), (2, 100)])
def test_cifar_file_gives_images_and_last_label(
    tmp_path: Path, label_bytes: int, classes: int
) -> None:
    content, images, labels = cifar_records(5, label_bytes, classes)
    (tmp_path / "b.bin").write_bytes(content)
    split = readers.read_cifar_file(tmp_path / "b.bin", classes, label_bytes, records=5)
    assert torch.equal(split.images, images)
    assert torch.equal(split.labels, labels)


@pytest.mark.parametrize("cut", [1, 3073], ids=["a byte", "a whole record"])
def test_truncated_cifar_file_is_refused(tmp_path: Path, cut: int) -> None:
    content, _, _ = cifar_records(5, 1, 10)
    (tmp_path / "b.bin").write_bytes(content[:-cut])
    with pytest.raises(InputError, match=r"b\.bin: expected 5 records of 3073 bytes = 15365"):
        readers.read_cifar_file(tmp_path / "b.bin", 10, 1, records=5)


def test_label_out_of_range_is_refused_with_its_record(tmp_path: Path) -> None:
    content = bytearray(cifar_records(5, 1, 10)[0])
    content[2 * 3073] = 10
    (tmp_path / "b.bin").write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"expected labels in 0\.\.9, got 10 at record 2"):
        readers.read_cifar_file(tmp_path / "b.bin", 10, 1, records=5)


def test_cifar_folder_names_its_missing_files(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"missing \['data_batch_1.bin'"):
        data.load_dataset("cifar10", data.Source(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "tiny-imagenet"])
def test_absent_data_set_says_where_it_looked(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"looked for {tmp_path}/.*--data-dir.*--download"):
        data.load_dataset(name, data.Source(tmp_path))


def test_unknown_data_set_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        data.load_dataset("cifar11", data.Source(tmp_path))


def test_python_layout_is_checked_by_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": b"", b"labels": []}))
    with pytest.raises(InputError, match=r"torchvision could not read it: .*corrupted"):
        data.load_dataset("cifar10", data.Source(tmp_path))


def test_python_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar = import_torchvision("torchvision.datasets").CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    sums = {}
    for name, content in (
        ("batch", {"data": pixels, "labels": [3, 9]}),
        ("meta", {"label_names": list("abcdefghij")}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [["batch", sums["batch"]]])
    monkeypatch.setattr(cifar, "test_list", [["batch", sums["batch"]]])
    meta = {"filename": "meta", "key": "label_names", "md5": sums["meta"]}
    monkeypatch.setattr(cifar, "meta", meta)
    dataset = data.load_dataset("cifar10", data.Source(tmp_path))
    assert torch.equal(dataset.train.images, torch.from_numpy(pixels).reshape(2, 3, 32, 32))
    assert dataset.test.labels.tolist() == [3, 9]


def test_torchvision_imports_twice() -> None:
    assert import_torchvision("torchvision.datasets").CIFAR10 is not None
    assert import_torchvision("torchvision.datasets").CIFAR10 is not None


def idx_bytes(array: Tensor) -> bytes:
    header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    return header + array.numpy().tobytes()


def write_fashion_mnist(folder: Path, suffix: str) -> dict[str, Tensor]:
    """Write five training and three test images of 4x4 pixels in the idx layout."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for prefix, count in (("train", 5), ("t10k", 3)):
        pixels = torch.arange(count * 16, dtype=torch.uint8).reshape(count, 4, 4)
        tensors[f"{prefix}-images-idx3-ubyte"] = pixels
        tensors[f"{prefix}-labels-idx1-ubyte"] = torch.arange(count, dtype=torch.uint8)
    for name, tensor in tensors.items():
        content = idx_bytes(tensor)
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    return tensors


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_layouts(tmp_path: Path, suffix: str, below: str) -> None:
    tensors = write_fashion_mnist(tmp_path / "d" / below, suffix)
    dataset = data.load_dataset("fashion-mnist", data.Source(tmp_path / "d"))
    assert torch.equal(dataset.train.images[:, 0], tensors["train-images-idx3-ubyte"])
    assert torch.equal(dataset.test.labels, tensors["t10k-labels-idx1-ubyte"].long())
    assert (dataset.classes, dataset.channels, dataset.size) == (10, 1, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "expected an idx file of bytes"),
        (b"", "expected an idx file of bytes"),
        (b"\x00\x00\x08\x02\x00\x00\x00\x02\x00\x00", "truncated"),
        (idx_bytes(torch.zeros(4, 4, dtype=torch.uint8))[:-1], r"promises \[4, 4\] = 28 .* got 27"),
    ],
)
def test_damaged_idx_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=message):
        readers.read_idx(tmp_path / "x")


@pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
def test_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    raw = idx_bytes(torch.arange(64, dtype=torch.uint8).reshape(8, 8))
    packed = bytearray(gzip.compress(raw))
    if damage == "flip":
        packed[-8] ^= 0xFF  # the checksum
    content = {"cut": bytes(packed[:-9]), "flip": bytes(packed), "plain": raw}[damage]
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(InputError, match="damaged gzip file"):
        readers.read_idx(tmp_path / "x.gz")


def test_idx_pair_with_unequal_counts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(idx_bytes(torch.zeros(3, 2, 2, dtype=torch.uint8)))
    (tmp_path / "l").write_bytes(idx_bytes(torch.zeros(2, dtype=torch.uint8)))
    with pytest.raises(InputError, match="3 images but 2 labels"):
        readers.read_idx_pair(tmp_path / "i", tmp_path / "l", classes=10)


def save_image(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)


def write_image_folder(root: Path) -> None:
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            for index in range(3):
                save_image(root / split / name / f"{index}.png", 100 * number + index, (8, 12))


def test_image_folder_is_read_scaled_and_cut(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    dataset = data.load_dataset(str(tmp_path), data.Source(tmp_path, size=4))
    assert dataset.train.images.shape == (6, 3, 4, 4)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    limited = data.load_dataset(str(tmp_path), data.Source(tmp_path, size=4, limit_train=2))
    assert (len(limited.train), len(limited.test)) == (2, 6)


def test_image_folder_faults_are_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    source = data.Source(tmp_path, size=4)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"0\.png: cannot be read as an image"):
        data.load_dataset(str(tmp_path), source)
    save_image(tmp_path / "train" / "ant" / "0.png", 0)
    save_image(tmp_path / "val" / "cow" / "0.png", 0)
    with pytest.raises(InputError, match=r"only the 2 classes of the training folder.*cow"):
        data.load_dataset(str(tmp_path), source)
    with pytest.raises(InputError, match="expected a folder with one subfolder for each class"):
        data.load_dataset(str(tmp_path / "val"), source)


def test_official_tiny_imagenet_layout(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(("n01", "n02")):
        save_image(root / "train" / name / "images" / f"{name}_0.JPEG", 50 * number, (64, 64))
        save_image(root / "val" / "images" / f"val_{number}.JPEG", 50 * number, (64, 64))
    lines = "val_0.JPEG\tn02\t0\t0\t63\t63\nval_1.JPEG\tn01\t0\t0\t63\t63\n"
    (root / "val" / "val_annotations.txt").write_text(lines)
    dataset = data.load_dataset("tiny-imagenet", data.Source(tmp_path))
    assert (dataset.classes, dataset.size, len(dataset.train)) == (2, 64, 2)
    assert dataset.test.labels.tolist() == [1, 0]
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\n")
    with pytest.raises(InputError, match="expected a class of train/, got 'n03'"):
        data.load_dataset("tiny-imagenet", data.Source(tmp_path))


def test_digits_split_is_fixed_and_disjoint(tmp_path: Path) -> None:
    first, again = (data.load_dataset("digits", data.Source(tmp_path)) for _ in range(2))
    assert torch.equal(first.train.images, again.train.images)
    assert (len(first.train), len(first.test), first.size) == (1438, 359, 16)
    known = {image.numpy().tobytes() for image in first.train.images}
    assert not any(image.numpy().tobytes() in known for image in first.test.images)


def test_channel_statistics_match_the_naive_formula() -> None:
    images = torch.randint(256, (7, 3, 5, 5), dtype=torch.uint8)
    mean, std = data.channel_statistics(images)
    flat = images.double().transpose(0, 1).flatten(1)
    # Both sides differ only by one rounding to float32 (2**-24 relative) of float64 results.
    torch.testing.assert_close(mean.flatten(), flat.mean(1).float(), rtol=2e-7, atol=0)
    expected = flat.std(1, correction=0).float()
    torch.testing.assert_close(std.flatten(), expected, rtol=2e-7, atol=0)


def test_random_crop_shifts_every_image_by_its_own_offset() -> None:
    images = torch.randint(1, 256, (6, 2, 5, 5), dtype=torch.uint8)
    crop = example_batches.random_crop(images, 2, torch.Generator().manual_seed(1))
    shifts = torch.randint(5, (2, 6, 1), generator=torch.Generator().manual_seed(1))
    for number in range(6):
        padded = torch.zeros(2, 9, 9, dtype=torch.uint8)
        padded[:, 2:7, 2:7] = images[number]
        top, left = int(shifts[0, number]), int(shifts[1, number])
        assert torch.equal(crop[number], padded[:, top : top + 5, left : left + 5])


def make_batches() -> example_batches.Batches:
    images = torch.randint(256, (10, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator())
    split = readers.Split(images, torch.arange(10))
    augmentation = example_batches.Augmentation(padding=1, flip=True)
    return example_batches.Batches(split, 3, augmentation, torch.Generator().manual_seed(0))


def test_batches_continue_from_saved_state() -> None:
    straight, other = make_batches(), make_batches()
    straight.start_epoch()
    straight.next()
    other.load_state_dict(straight.state_dict())
    for _ in range(2):
        images, labels = straight.next()
        other_images, other_labels = other.next()
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_an_epoch_sees_every_image_at_most_once() -> None:
    batches = make_batches()
    batches.start_epoch()
    seen = torch.cat([batches.next()[1] for _ in range(len(batches))])
    assert len(batches) == 3
    assert len(seen.unique()) == 9
