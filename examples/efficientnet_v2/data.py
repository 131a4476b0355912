"""Finds data sets by name, reads and checks them, and keeps them in memory as uint8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import InputError
from readers import (
    Split,
    checked,
    class_folders,
    list_images,
    read_cifar,
    read_idx_pair,
    read_images,
    spread,
)
from torch import Tensor
from torch.nn import functional as F
from vision import import_torchvision

from brevitas_bp.errors import nearest

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class Dataset:
    """Two splits, and the statistics that normalise them.

    Attributes:
        mean: Mean of each channel of the training images, `(C, 1, 1)`, in 0..255.
        std: Standard deviation of each channel, same shape.
        flip: Whether a mirrored image still shows its class.
    """

    name: str
    train: Split
    test: Split
    classes: int
    flip: bool
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        """Channels of the images: 1 or 3."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Side of the square images, in pixels."""
        return self.train.images.shape[-1]


@dataclass(frozen=True)
class Source:
    """Where to look for a data set, and how many of its images to keep (0: all)."""

    folder: Path
    download: bool = False
    size: int = 64
    limit_train: int = 0
    limit_test: int = 0

    def limits(self) -> tuple[int, int]:
        """Return how many training and test images to keep."""
        return self.limit_train, self.limit_test


def load_dataset(name: str, source: Source) -> Dataset:
    """Return the data set called `name`, or the image folder at the path `name`."""
    if name in _LOADERS:
        train, test, classes, flip = _LOADERS[name](source)
    elif Path(name).is_dir():
        train, test, classes, flip = _image_folder(Path(name), source)
    else:
        raise InputError(
            f"--dataset {name}: expected one of {', '.join(_LOADERS)} or a folder with train/ and "
            f"val/{nearest(name, _LOADERS)}"
        )
    train, test = (
        s.subset(spread(len(s), n)) for s, n in zip((train, test), source.limits(), strict=True)
    )
    mean, std = channel_statistics(train.images)
    return Dataset(name, train, test, classes, flip, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, `(C, 1, 1)`, from exact integer counts."""
    value = torch.arange(256, dtype=torch.float64)
    counts = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])]
    table = torch.stack(counts).double() / counts[0].sum()
    mean = table @ value
    std = (table @ value**2 - mean**2).clamp(min=1.0).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]


Loaded = tuple[Split, Split, int, bool]


def _digits(source: Source) -> Loaded:
    """Return scikit-learn's 1797 digits, scaled from 8x8 to 16x16; a fixed fifth of them is for test."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(small, size=16, mode="bilinear", align_corners=False)
    whole = checked(
        images.round().to(torch.uint8), torch.from_numpy(np.asarray(labels)), 10, "digits"
    )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    tests = len(whole) // 5
    return whole.subset(order[tests:]), whole.subset(order[:tests]), 10, False


@dataclass(frozen=True)
class _Cifar:
    """CIFAR-10 or CIFAR-100: names and sizes of the official files."""

    torchvision_class: str
    folder: str
    train: list[str]
    test: list[str]
    classes: int
    label_bytes: int
    train_records: int

    def __call__(self, source: Source) -> Loaded:
        found = self._binary(source.folder) or self._pickle(source.folder, download=False)
        if found is None and source.download:
            found = self._pickle(source.folder, download=True)
        if found is None:
            raise _not_found(source, [f"{self.folder}/{self.test[0]}", f"{self.test[0]}"], "CIFAR")
        return (*found, self.classes, True)

    def _binary(self, root: Path) -> tuple[Split, Split] | None:
        for folder in (root / self.folder, root):
            if (folder / self.test[0]).is_file():
                facts = (self.classes, self.label_bytes)
                train = read_cifar(folder, self.train, *facts, self.train_records)
                return train, read_cifar(folder, self.test, *facts, 10_000)
        return None

    def _pickle(self, root: Path, *, download: bool) -> tuple[Split, Split] | None:
        """Read the Python version with torchvision, which fetches it and checks its MD5 sums."""
        batches = root / _PYTHON_FOLDERS[self.torchvision_class]
        if not download and not batches.is_dir():
            return None
        make = getattr(import_torchvision("torchvision.datasets"), self.torchvision_class)
        parts = [_torchvision(make, root, batches, download, train=flag) for flag in (True, False)]
        return tuple(  # type: ignore[return-value]
            checked(
                torch.from_numpy(part.data).permute(0, 3, 1, 2),
                torch.tensor(part.targets),
                self.classes,
                batches,
            )
            for part in parts
        )


_PYTHON_FOLDERS = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}


def _torchvision(make: Any, root: Path, where: Path, download: bool, **options: Any) -> Any:
    """Make a torchvision data set; turn its failures into an `InputError` that names the folder."""
    try:
        return make(str(root), download=download, **options)
    except (OSError, RuntimeError, EOFError) as error:
        verb = "download" if download else "read"
        raise InputError(f"{where}: torchvision could not {verb} it: {error}") from error


_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_files(root: Path) -> list[Path] | None:
    """Return the four idx files from one of their usual folders, plain or compressed."""
    for folder in (root / "FashionMNIST" / "raw", root / "fashion-mnist", root):
        for suffix in ("", ".gz"):
            files = [folder / (name + suffix) for name in _IDX]
            if all(file.is_file() for file in files):
                return files
    return None


def _fashion_mnist(source: Source) -> Loaded:
    files = _idx_files(source.folder)
    if files is None and source.download:
        make = import_torchvision("torchvision.datasets").FashionMNIST
        _torchvision(make, source.folder, source.folder / "FashionMNIST", True)
        files = _idx_files(source.folder)
    if files is None:
        raise _not_found(source, [f"FashionMNIST/raw/{n}[.gz]" for n in _IDX], "Fashion-MNIST")
    return read_idx_pair(*files[:2], classes=10), read_idx_pair(*files[2:], classes=10), 10, True


def _tiny_imagenet(source: Source) -> Loaded:
    folder = source.folder / "tiny-imagenet-200"
    if not folder.is_dir() and source.download:
        fetch = import_torchvision("torchvision.datasets.utils").download_and_extract_archive
        try:
            fetch(TINY_IMAGENET, str(source.folder), md5=TINY_IMAGENET_MD5)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{folder}: could not download {TINY_IMAGENET}: {error}") from error
    if not folder.is_dir():
        raise _not_found(
            source, ["tiny-imagenet-200/train", "tiny-imagenet-200/val"], "Tiny ImageNet"
        )
    return _image_folder(folder, source)


def _image_folder(folder: Path, source: Source) -> Loaded:
    """Read `folder/train/<class>/**` and `folder/val` (or `test`) with the same classes.

    The official Tiny ImageNet keeps all validation images in one folder and their classes in
    `val_annotations.txt`. This function reads that layout too.
    """
    classes = class_folders(folder / "train")
    held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), folder / "val")
    annotations = held_out / "val_annotations.txt"
    tests = (
        _annotated(annotations, classes)
        if annotations.is_file()
        else list_images(held_out, classes)
    )
    splits = []
    for where, items, limit in (
        (folder / "train", list_images(folder / "train", classes), source.limit_train),
        (held_out, tests, source.limit_test),
    ):
        chosen = [items[i] for i in spread(len(items), limit).tolist()]
        splits.append(read_images(chosen, len(classes), source.size, where))
    return splits[0], splits[1], len(classes), True


def _annotated(annotations: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return `(file, label)` for each line `name<TAB>class<TAB>...`."""
    numbers = {name: number for number, name in enumerate(classes)}
    items = []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label not in numbers:
            raise InputError(
                f"{annotations}: expected a class of train/, got {label!r} for {name!r}"
            )
        items.append((annotations.parent / "images" / name, numbers[label]))
    return items


def _not_found(source: Source, names: list[str], what: str) -> InputError:
    tried = ", ".join(str(source.folder / name) for name in names)
    remedy = "the download left no such files" if source.download else "add --download"
    return InputError(f"{what} not found: looked for {tried}; pass --data-dir, or {remedy}")


_LOADERS: dict[str, Callable[[Source], Loaded]] = {
    "digits": _digits,
    "cifar10": _Cifar(
        "CIFAR10",
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
        classes=10,
        label_bytes=1,
        train_records=10_000,
    ),
    "cifar100": _Cifar(
        "CIFAR100",
        "cifar-100-binary",
        ["train.bin"],
        ["test.bin"],
        classes=100,
        label_bytes=2,
        train_records=50_000,
    ),
    "fashion-mnist": _fashion_mnist,
    "tiny-imagenet": _tiny_imagenet,
}
