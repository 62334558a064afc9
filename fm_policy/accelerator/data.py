"""Push-T's demonstrations with pixels in one safetensors file, and training windows of them on the device."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from fm_policy.files import read_tensors, write_tensors
from fm_policy.windows import WindowedConfig

IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
NUMBERS = (STATE, ACTION)
IS_PAD = f"{ACTION}_is_pad"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # LeRobot's `use_imagenet_stats`
EPS = 1e-8  # of LeRobot's normaliser

Statistics = dict[str, dict[str, list[float]]]
"""`min` and `max` by the names of state and action."""


@dataclass(frozen=True)
class Demonstrations:
    """Episodes, one after another.

    Attributes:
        frames: Pictures, `(N, 3, H, W)` uint8.
        numbers: State and action by their names, `(N, d)` float32, in the units of the recording.
        ends: For each episode the index after its last frame, `(E,)`, ascending.
        statistics: Of the numbers.
    """

    frames: Tensor
    numbers: dict[str, Tensor]
    ends: Tensor
    statistics: Statistics

    def save(self, file: Path) -> None:
        """Write all of it to a file; the frames by zlib, which makes of Push-T's 710 MB 17."""
        squeezed = np.frombuffer(zlib.compress(self.frames.numpy().tobytes()), np.uint8).copy()
        tensors = {"frames": torch.from_numpy(squeezed), "ends": self.ends, **self.numbers}
        write_tensors(file, tensors, {"shape": list(self.frames.shape), "statistics": self.statistics})


def load(file: Path) -> Demonstrations:
    """Read what `Demonstrations.save` wrote.

    Raises:
        ValueError: If there is no such file, or it is another one.
    """
    try:
        tensors, metadata = read_tensors(file)
        pixels = np.frombuffer(zlib.decompress(tensors["frames"].numpy()), np.uint8).copy()
        frames = torch.from_numpy(pixels).view(metadata["shape"])
        numbers = {name: tensors[name] for name in NUMBERS}
        return Demonstrations(frames, numbers, tensors["ends"], metadata["statistics"])
    except (OSError, SafetensorError, KeyError, AttributeError, zlib.error, RuntimeError) as error:
        raise ValueError(f"{file} is no file of `accelerator.py pack`: {error}") from error


def pack(root: Path) -> Demonstrations:
    """The demonstrations of a LeRobotDataset with pixels.

    Raises:
        ValueError: If there is none, or it lacks picture, state or action.
    """
    from lerobot.datasets import LeRobotDatasetMetadata

    from fm_policy import window_store

    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"no LeRobotDataset in {root}: it has no meta/info.json")
    meta = LeRobotDatasetMetadata(f"local/{root.name}", root=root)
    missing = [name for name in (IMAGE, *NUMBERS) if name not in meta.features]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}: it must be recorded with pixels, --obs image")
    store = window_store.open_store(meta, [0], [0], [IMAGE, *NUMBERS])
    numbers = {name: torch.from_numpy(store.arrays[name].copy()) for name in NUMBERS}
    kept = {name: {kind: np.ravel(meta.stats[name][kind]).tolist() for kind in ("min", "max")} for name in NUMBERS}
    return Demonstrations(torch.from_numpy(store.arrays[IMAGE].copy()), numbers, torch.from_numpy(store.ends), kept)


def at_random(policy: Mapping[str, Any], episodes: int = 20, length: int = 50) -> Demonstrations:
    """Noise in the shapes that a policy asks for, where only the speed matters."""
    count = episodes * length
    features = policy["input_features"] | policy["output_features"]
    frames = torch.randint(256, (count, *features[IMAGE]["shape"]), dtype=torch.uint8)
    numbers = {name: torch.rand(count, *features[name]["shape"]) for name in NUMBERS}
    bounds = {name: {"min": x.amin(0).tolist(), "max": x.amax(0).tolist()} for name, x in numbers.items()}
    return Demonstrations(frames, numbers, length * torch.arange(1, episodes + 1), bounds)


class _Window(WindowedConfig):
    """The window of a policy."""

    window_store = False

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self.n_obs_steps, self.horizon = policy["n_obs_steps"], policy["horizon"]


class Windows:
    """Training windows as LeRobot's loader and normaliser make them, from data that lie on the device.

    Attributes:
        frames: All pictures, `(N, 3, H, W)` uint8.
        statistics: Of the numbers.
        train: Frames that training starts from.
        held_out: The same of the last episodes, which nothing is learned from.
    """

    def __init__(self, demos: Demonstrations, policy: Mapping[str, Any], held_out: float, device: torch.device) -> None:
        """Move the data to the device.

        Args:
            demos: The data.
            policy: Fields of the policy's configuration: the features, their window and `drop_n_last_frames`.
            held_out: Share of the episodes at the end, rounded up, that is kept from training.
            device: Where the windows are made.

        Raises:
            ValueError: If shapes of features are not the policy's, or no frame to start from is left.
        """
        self.statistics = demos.statistics
        _check_shapes(demos, policy)
        window = _Window(policy)
        self._observed = torch.tensor(window.observation_window, device=device)
        self._acted = torch.tensor(window.action_window, device=device)
        self.frames = demos.frames.to(device)
        self._numbers = {name: _scaled(x, demos.statistics[name]).to(device) for name, x in demos.numbers.items()}
        self._mean, self._std = (torch.tensor(IMAGENET[kind], device=device).view(3, 1, 1) for kind in ("mean", "std"))
        lengths = demos.ends.diff(prepend=demos.ends.new_zeros(1))
        self._last = (demos.ends - 1).repeat_interleave(lengths).to(device)
        self._first = (demos.ends - lengths).repeat_interleave(lengths).to(device)
        present = torch.arange(len(demos.frames), device=device)
        starts = self._last - present >= policy["drop_n_last_frames"]
        kept = len(demos.ends) - math.ceil(len(demos.ends) * held_out)
        border = int(demos.ends[kept - 1]) if kept else 0
        self.train, self.held_out = present[starts & (present < border)], present[starts & (present >= border)]
        if not len(self.train):
            raise ValueError(
                f"no frame to train from: {len(demos.ends)} episodes, {held_out:g} of them held out, "
                f"without the last {policy['drop_n_last_frames']} frames of each"
            )

    def draw(self, size: int) -> dict[str, Tensor]:
        """A batch of random training windows, by torch's generator of the CPU."""
        return self.at(self.train[torch.randint(len(self.train), (size,)).to(self.train.device)])

    def at(self, present: Tensor) -> dict[str, Tensor]:
        """The windows around some frames, normalised.

        Args:
            present: Their indices, `(B,)`.

        Returns:
            `observation.image` `(B, n_obs_steps, 3, H, W)`, `observation.state` `(B, n_obs_steps, d)`, `action`
            `(B, horizon, d)`, and `action_is_pad` `(B, horizon)`, True beyond the episode's end.
        """
        observed, _ = self._inside(present, self._observed)
        acted, is_pad = self._inside(present, self._acted)
        pictures = (self.frames[observed].float() / 255 - self._mean) / (self._std + EPS)
        state, action = self._numbers[STATE][observed], self._numbers[ACTION][acted]
        return {IMAGE: pictures, STATE: state, ACTION: action, IS_PAD: is_pad}

    def _inside(self, present: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Frames of the windows, beyond an episode its first or last one; and whether they lie beyond."""
        wanted = present[:, None] + window
        inside = wanted.clamp(self._first[present, None], self._last[present, None])
        return inside, inside != wanted


def _scaled(values: Tensor, bounds: Mapping[str, list[float]]) -> Tensor:
    low, high = (torch.tensor(bounds[kind]) for kind in ("min", "max"))
    span = torch.where(high == low, EPS, high - low)
    return 2 * (values - low) / span - 1


def _check_shapes(demos: Demonstrations, policy: Mapping[str, Any]) -> None:
    wanted = policy["input_features"] | policy["output_features"]
    found = {IMAGE: list(demos.frames.shape[1:])} | {name: list(x.shape[1:]) for name, x in demos.numbers.items()}
    for name, shape in found.items():
        if name not in wanted or list(wanted[name]["shape"]) != shape:
            raise ValueError(f"'{name}' of the data has the shape {shape}, the recipe says {wanted.get(name)}")
    if set(wanted) != set(found):
        raise ValueError(f"the recipe has the features {sorted(wanted)}, the data {sorted(found)}")
