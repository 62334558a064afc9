"""How far a set of images is from another: Fréchet's distance between the normal laws of their features."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_policy.images.data import Images, Split
from fm_policy.repeatable import repeatable

CPU = torch.device("cpu")
FEATURES = 32
CLASSIFIER_BATCH, CLASSIFIER_LR = 64, 2e-3
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"

Extractor = Callable[[Tensor], Tensor]
"""Features `(B, d)` of pictures `(B, channels, height, width)` in [0, 1]."""


class Moments(nn.Module):
    """Mean and covariance of features that come batch by batch; a module for its `state_dict`."""

    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(features, features, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Count a batch `(B, d)`."""
        rows = features.detach().to(self.total)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def mean(self) -> Tensor:
        """`(d,)`."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Unbiased, `(d, d)`.

        Raises:
            ValueError: If fewer than two rows were counted.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {int(self.count)}")
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982; FID, Heusel et al. 2017)."""
    first, second = a.covariance(), b.covariance()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()  # tr (C_a C_b)^(1/2)
    return float((a.mean() - b.mean()).square().sum() + first.trace() + second.trace() - 2 * cross)


class Classifier(nn.Module):
    """A small convolutional net; the numbers before its last layer are features of an image."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, FEATURES),
        )
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, classes))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits `(B, classes)`."""
        return self.last(self.body(pictures))

    def features(self, pictures: Tensor) -> Tensor:
        """See `Extractor`."""
        return self.body(pictures)


def train_classifier(
    images: Images, steps: int, device: torch.device, progress: Callable[[], object] = lambda: None
) -> Classifier:
    """A classifier of the training images, the same whatever the seed of the flows; frozen."""
    pixels, labels = images.train
    with repeatable((0,), device):
        net = Classifier(images.shape[2], images.classes).to(device)
        optimizer = torch.optim.Adam(net.parameters(), CLASSIFIER_LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(labels), (CLASSIFIER_BATCH,))
            logits = net(_pictures(images, pixels[rows].to(device)))
            loss = F.cross_entropy(logits, labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress()
    return net.requires_grad_(False)


@torch.no_grad()
def accuracy(net: Classifier, images: Images, split: Split) -> float:
    """Share of images whose class the classifier finds."""
    device = next(net.parameters()).device
    right = sum(
        int((net(_pictures(images, pixels.to(device))).argmax(1).cpu() == labels).sum())
        for pixels, labels in zip(*(part.split(512) for part in split), strict=True)
    )
    return right / len(split.labels)


@torch.no_grad()
def moments(extract: Extractor, pictures: Iterator[Tensor]) -> Moments:
    """Of the features of all batches of pictures.

    Raises:
        ValueError: If there is no batch.
    """
    found: Moments | None = None
    for batch in pictures:
        features = extract(batch)
        found = Moments(features.shape[1]) if found is None else found
        found.add(features.cpu())
    if found is None:
        raise ValueError("there are no images to measure")
    return found


def real_pictures(images: Images, split: Split, device: torch.device) -> Iterator[Tensor]:
    """A split's pictures, batch by batch."""
    for pixels in split.pixels.split(512):
        yield _pictures(images, pixels.to(device))


def inception(device: torch.device) -> Extractor:
    """The 2048 features of FID, by torchmetrics, if it and its weights are on this machine already.

    Raises:
        ValueError: If torchmetrics, torch-fidelity or the weights are not there.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError(
            "FID needs torchmetrics and torch-fidelity: pip install torchmetrics torch-fidelity"
        ) from error
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not weights.is_file():
        raise ValueError(f"FID needs the weights {weights}, of torch-fidelity's releases: nothing is downloaded here")
    net = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights)).inception.to(device)
    return lambda pictures: net((pictures.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))


def batches(count: int, size: int) -> Iterator[int]:
    """Sizes of the batches that make up `count`."""
    for n in range(math.ceil(count / size)):
        yield min(size, count - n * size)


def _pictures(images: Images, pixels: Tensor) -> Tensor:
    return images.pictures(images.chunks(pixels))
