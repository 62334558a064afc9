"""Readers of labelled images, on the real digits and on small files of the other formats."""

import gzip

import numpy as np
import pytest
import torch

from fm_policy.images.data import cifar10, digits, fashion

FASHION = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def write_idx(file, numbers):
    head = bytes([0, 0, 8, numbers.ndim]) + np.array(numbers.shape, ">u4").tobytes()
    file.write_bytes(gzip.compress(head + numbers.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_folder(tmp_path):
    for count, images, labels in ((3, *FASHION[:2]), (2, *FASHION[2:])):
        write_idx(tmp_path / images, np.arange(count * 28 * 28).reshape(count, 28, 28) % 256)
        write_idx(tmp_path / labels, np.arange(count))
    return tmp_path


@pytest.fixture
def cifar10_folder(tmp_path):
    """Two images a file, the labels 4 and 7; red is the column, green the row, blue the file's number."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for n, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        row, column = np.mgrid[:32, :32]
        image = np.stack([column, row, np.full((32, 32), n)]).astype(np.uint8)
        (folder / name).write_bytes(b"".join(bytes([label]) + image.tobytes() for label in (4, 7)))
    return tmp_path


class TestDigits:
    def test_a_quarter_of_each_class_is_held_out(self):
        images = digits()
        assert images.shape == (8, 8, 1)
        assert len(images.train.labels) == 1347 and len(images.held_out.labels) == 450
        shares = images.held_out.labels.bincount() / (
            images.train.labels.bincount() + images.held_out.labels.bincount()
        )
        assert len(shares) == images.classes == 10
        torch.testing.assert_close(shares, torch.full((10,), 0.25), atol=0.005, rtol=0)

    def test_no_image_is_in_both_parts(self):
        train, held_out = ({p.numpy().tobytes() for p in split.pixels} for split in digits()[:2])
        assert len(train) > 1300 and len(held_out) > 430
        assert not train & held_out

    def test_chunks_are_in_minus_one_to_one_and_pictures_undo_them(self):
        images = digits()
        pixels = images.train.pixels[:50]
        chunks = images.chunks(pixels)
        assert chunks.shape == (50, 64, 1)
        assert chunks.min() == -1 and chunks.max() == 1
        torch.testing.assert_close(images.pictures(chunks), pixels.movedim(-1, 1) / 16)
        assert images.pictures(3 * chunks).max() == 1  # what lies outside is cut off

    def test_looks_like_digits(self):
        """A zero is hollow: dark in the middle, bright around."""
        images = digits()
        zeros = images.pictures(images.chunks(images.train.pixels[images.train.labels == 0])).mean(0)[0]
        assert zeros[3:5, 3:5].mean() < 0.2 and zeros[2:6, 2].min() > 0.4


class TestFashion:
    def test_reads_images_and_labels(self, fashion_folder):
        images = fashion(fashion_folder)
        assert images.shape == (28, 28, 1)
        assert images.train.labels.tolist() == [0, 1, 2] and images.held_out.labels.tolist() == [0, 1]
        assert images.train.pixels.flatten().tolist() == [n % 256 for n in range(3 * 28 * 28)]

    def test_names_what_is_missing(self, fashion_folder):
        (fashion_folder / FASHION[1]).unlink()
        (fashion_folder / FASHION[2]).unlink()
        with pytest.raises(ValueError, match=f"lacks {FASHION[1]}, {FASHION[2]} of fashion"):
            fashion(fashion_folder)

    def test_a_file_that_is_cut_off_is_refused(self, fashion_folder):
        file = fashion_folder / FASHION[0]
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
        with pytest.raises(ValueError, match=f"{FASHION[0]} is no idx file of bytes, or is cut off"):
            fashion(fashion_folder)

    @pytest.mark.parametrize(
        "spoil", [lambda content: content[: len(content) // 2], lambda _: b"<html>not found</html>"]
    )
    def test_a_download_that_broke_off_is_refused(self, fashion_folder, spoil):
        file = fashion_folder / FASHION[0]
        file.write_bytes(spoil(file.read_bytes()))
        with pytest.raises(ValueError, match=f"{FASHION[0]} is no idx file of bytes, or is cut off"):
            fashion(fashion_folder)

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x08\3\0\0", b"\0\0\x0d\1\0\0\0\1\0"])
    def test_a_file_of_another_kind_is_refused(self, fashion_folder, content):
        (fashion_folder / FASHION[3]).write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=f"{FASHION[3]} is no idx file of bytes"):
            fashion(fashion_folder)

    def test_labels_must_belong_to_the_images(self, fashion_folder):
        write_idx(fashion_folder / FASHION[1], np.arange(2))
        with pytest.raises(ValueError, match="do not belong together"):
            fashion(fashion_folder)

    def test_needs_a_folder(self):
        with pytest.raises(ValueError, match="name their folder by --root; it holds train-images"):
            fashion(None)


class TestCifar10:
    @pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
    def test_reads_the_binary_version(self, cifar10_folder, inner):
        images = cifar10(cifar10_folder / inner)
        assert images.shape == (32, 32, 3)
        assert images.train.labels.tolist() == [4, 7] * 5 and images.held_out.labels.tolist() == [4, 7]
        assert images.train.pixels[2, 20, 11].tolist() == [11, 20, 1]  # of the second file, row 20, column 11
        assert images.held_out.pixels[1, 0, 31].tolist() == [31, 0, 5]

    def test_names_what_is_missing(self, cifar10_folder):
        """The Python version has the same names without `.bin`, and is pickled."""
        folder = cifar10_folder / "cifar-10-batches-bin"
        (folder / "data_batch_3.bin").rename(folder / "data_batch_3")
        with pytest.raises(ValueError, match=r"lacks data_batch_3.bin of cifar10 \(pickled versions are not read\)"):
            cifar10(cifar10_folder)

    def test_a_file_that_is_cut_off_is_refused(self, cifar10_folder):
        file = cifar10_folder / "cifar-10-batches-bin" / "test_batch.bin"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"6145 bytes, which is no whole number of images of 3073"):
            cifar10(cifar10_folder)
