"""Labelled images: the digits that come with scikit-learn, Fashion-MNIST and CIFAR-10 from their usual files.

Nothing is downloaded, and nothing is unpickled.
"""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fm_policy.files import digest

HELD_OUT_DIGITS = 450  # a quarter
CIFAR10_SHAPE = (3, 32, 32)


class Split(NamedTuple):
    """Images with their classes.

    Attributes:
        pixels: Whole numbers from 0 to the data set's top, `(N, height, width, channels)` uint8.
        labels: Classes from 0, `(N,)` int64.
    """

    pixels: Tensor
    labels: Tensor


class Images(NamedTuple):
    """A data set.

    Attributes:
        train: What models learn from.
        held_out: What they never see.
        top: The brightest value of a pixel.
        classes: How many there are.
    """

    train: Split
    held_out: Split
    top: int
    classes: int = 10

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels

    def fingerprint(self) -> str:
        """Hash of every pixel and label: of which data a model or a number is."""
        return digest([*self.train, *self.held_out])

    def chunks(self, pixels: Tensor) -> Tensor:
        """Whole numbers `(B, height, width, channels)` as chunks `(B, pixels, channels)` in [-1, 1]."""
        return pixels.flatten(1, 2).float() * (2 / self.top) - 1

    def pictures(self, x: Tensor) -> Tensor:
        """Chunks as pictures `(B, channels, height, width)` in [0, 1]; what lies outside is cut off."""
        return (x.unflatten(1, self.shape[:2]).movedim(-1, 1) + 1).clamp(0, 2) / 2


def digits(_root: Path | None = None) -> Images:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 in 17 greys; a quarter of each class is held out.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'lerobot_policy_fm_ft[images]'") from error
    found = load_digits()
    pixels, labels = found.images.astype(np.uint8)[..., None], found.target
    parts = train_test_split(pixels, labels, test_size=HELD_OUT_DIGITS, stratify=labels, random_state=0)
    train, held_out, train_labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return Images(Split(train, train_labels), Split(held_out, held_out_labels), top=16)


def fashion(root: Path | None) -> Images:
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28, from its four `.gz` files; MNIST's own have the same names.

    Raises:
        ValueError: If a file is missing, or is none of its kind.
    """
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = _find("fashion", root, names)
    train, train_labels, held_out, held_out_labels = (_read_idx(file) for file in files)
    splits = []
    for pixels, labels in ((train, train_labels), (held_out, held_out_labels)):
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise ValueError(f"images {pixels.shape} and labels {labels.shape} of {root} do not belong together")
        splits.append(Split(torch.from_numpy(pixels[..., None]), torch.from_numpy(labels.astype(np.int64))))
    return Images(splits[0], splits[1], top=255)


def cifar10(root: Path | None) -> Images:
    """CIFAR-10 (Krizhevsky 2009), 32 x 32 in colours, from its binary version's six files.

    Raises:
        ValueError: If a file is missing, or its size is not a whole number of images.
    """
    names = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    files = _find("cifar10", root, names, "cifar-10-batches-bin")
    records = [_read_cifar10(file) for file in files]
    return Images(_cifar10_split(np.concatenate(records[:-1])), _cifar10_split(records[-1]), top=255)


READERS: dict[str, Callable[[Path | None], Images]] = {"digits": digits, "fashion": fashion, "cifar10": cifar10}


def _find(data: str, root: Path | None, names: list[str], inner: str = "") -> list[Path]:
    """The files of these names in root, or in its folder `inner`."""
    if root is None:
        raise ValueError(f"{data} is read from files: name their folder by --root; it holds {', '.join(names)}")
    folder = root / inner if (root / inner).is_dir() else root
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of {data} (pickled versions are not read)")
    return [folder / name for name in names]


def _read_idx(file: Path) -> np.ndarray:
    """The bytes of an idx file: two zeros, 8 for bytes, the number of dimensions, their sizes, the numbers."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is no idx file of bytes, or is cut off: {error}") from error
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    sizes, numbers = content[4 : 4 + 4 * dimensions], content[4 + 4 * dimensions :]
    shape = [int.from_bytes(sizes[n : n + 4]) for n in range(0, len(sizes), 4)]
    if not dimensions or len(sizes) < 4 * dimensions or len(numbers) != math.prod(shape):
        raise ValueError(f"{file} is no idx file of bytes, or is cut off")
    return np.frombuffer(numbers, np.uint8).reshape(shape).copy()


def _read_cifar10(file: Path) -> np.ndarray:
    """Records of a label and an image, `(N, 3073)`."""
    size = 1 + math.prod(CIFAR10_SHAPE)
    numbers = np.fromfile(file, np.uint8)
    if not len(numbers) or len(numbers) % size:
        raise ValueError(f"{file} has {len(numbers)} bytes, which is no whole number of images of {size}")
    return numbers.reshape(-1, size)


def _cifar10_split(records: np.ndarray) -> Split:
    pixels = records[:, 1:].reshape(-1, *CIFAR10_SHAPE).transpose(0, 2, 3, 1)
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(records[:, 0].astype(np.int64)))
