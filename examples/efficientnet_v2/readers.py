"""Readers of the official file layouts: they turn files into checked uint8 tensors.

Every reader checks sizes, magic numbers and labels. So a damaged file stops the program before training
starts, with the file's name in the message.
"""

from __future__ import annotations

import gzip
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faults import InputError
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"})


@dataclass(frozen=True)
class Split:
    """Images, uint8 `(N, C, H, W)`, and labels, int64 `(N,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def subset(self, indices: Tensor) -> Split:
        """Return the images at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices])


def checked(images: Tensor, labels: Tensor, classes: int, where: Path | str) -> Split:
    """Return a `Split` after checking the counts, and the range of the labels against `classes`."""
    labels = labels.to(torch.int64)
    if len(images) != len(labels):
        raise InputError(f"{where}: {len(images)} images but {len(labels)} labels; fetch it again")
    if len(images) == 0:
        raise InputError(f"{where}: expected images, got none")
    bad = ((labels < 0) | (labels >= classes)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise InputError(
            f"{where}: expected labels in 0..{classes - 1}, got {int(labels[first])} at record "
            f"{first} ({len(bad)} in all); check that this is the right data set"
        )
    return Split(images.contiguous(), labels)


def spread(count: int, limit: int) -> Tensor:
    """Return `limit` indices below `count`, spread over all classes by a fixed shuffle; 0 keeps all."""
    if limit == 0 or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def read_cifar_file(path: Path, classes: int, label_bytes: int, records: int) -> Split:
    """Read one file of the CIFAR binary version.

    A record holds `label_bytes` label bytes (the last one is the class) and 3072 pixel bytes, channel
    first. `records` is the number of records in the official file.
    """
    data = np.fromfile(path, dtype=np.uint8)
    size = label_bytes + 3 * 32 * 32
    if data.size != records * size:
        raise InputError(
            f"{path}: expected {records} records of {size} bytes = {records * size} bytes, "
            f"got {data.size}; the file is truncated or of another data set, fetch it again"
        )
    table = torch.from_numpy(data.reshape(records, size))
    images = table[:, label_bytes:].reshape(-1, 3, 32, 32)
    return checked(images, table[:, label_bytes - 1], classes, path)


def read_cifar(
    folder: Path, names: list[str], classes: int, label_bytes: int, records: int
) -> Split:
    """Read the listed files of a CIFAR binary folder, one after another."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: expected the files {', '.join(names)}, missing {missing}")
    parts = [read_cifar_file(folder / n, classes, label_bytes, records) for n in names]
    return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, plain or gzip-compressed, with any number of dimensions.

    The header is two zero bytes, the type (8: unsigned byte), the number of dimensions, and one
    big-endian 32-bit integer for each dimension.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise InputError(f"{path}: expected an idx file of bytes (00 00 08 ..), got {data[:4]!r}")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise InputError(
            f"{path}: header promises {shape} = {expected} bytes with header, got {len(data)}; "
            "the file is truncated, fetch it again"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).copy()).reshape(shape)


def read_idx_pair(images: Path, labels: Path, classes: int) -> Split:
    """Read grey images `(N, H, W)` and labels `(N,)` from two idx files."""
    pixels, targets = read_idx(images), read_idx(labels)
    for path, tensor, dimensions in ((images, pixels, 3), (labels, targets, 1)):
        if tensor.dim() != dimensions:
            raise InputError(f"{path}: expected {dimensions} dimensions, got {tensor.dim()}")
    return checked(pixels[:, None], targets, classes, labels)


def class_folders(folder: Path) -> list[str]:
    """Return the class names of an image folder: the sorted names of its subfolders."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with one subfolder for each class, got none")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise InputError(f"{folder}: expected one subfolder for each class, got none inside")
    return names


def list_images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return `(file, label)` of every image below `folder/<class>`, sorted."""
    unknown = set(class_folders(folder)) - set(classes)
    if unknown:
        raise InputError(
            f"{folder}: expected only the {len(classes)} classes of the training folder, "
            f"got also {sorted(unknown)[:5]}"
        )
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]


def decode_image(path: Path, size: int) -> Tensor:
    """Decode an RGB image, scale its shorter side to `size`, and crop the centre `size` x `size`."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); fetch it again") from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_images(items: list[tuple[Path, int]], classes: int, size: int, where: Path) -> Split:
    """Decode the listed images, with one thread per core."""
    if not items:
        raise InputError(
            f"{where}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none"
        )
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda item: decode_image(item[0], size), items))
    return checked(torch.stack(images), torch.tensor([n for _, n in items]), classes, where)
