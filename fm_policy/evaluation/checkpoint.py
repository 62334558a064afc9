"""A checkpoint, ready to be evaluated."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.device_utils import get_safe_torch_device
from safetensors import SafetensorError, safe_open

from fm_policy.evaluation.inference import Processor
from fm_policy.evaluation.policies import POLICIES, ChunkPolicy
from fm_policy.evaluation.report import nfe_text
from fm_policy.flow.noise import check_noise_scale
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

FILES = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json")


@dataclass(frozen=True)
class Checkpoint[P: ChunkPolicy]:
    """A policy with its processors, and where it came from.

    Attributes:
        path: The folder.
        fingerprint: Of its content, see `fingerprint`.
        note: How its inference was changed, in words; empty if it was not.
        policy: In evaluation mode.
        preprocessor: From observations in LeRobot's form to the policy's.
        postprocessor: From the policy's actions to the environment's.
    """

    path: Path
    fingerprint: str
    note: str
    policy: P
    preprocessor: Processor
    postprocessor: Processor


def load_checkpoint(
    path: Path,
    device: str = "cpu",
    solver: str | None = None,
    nfe: int | None = None,
    noise_scale: float | None = None,
) -> Checkpoint[FlowMatchingPolicy]:
    """Load a checkpoint of the flow-matching policy, see `load_any_checkpoint`."""
    return _load(FlowMatchingPolicy, path, device, solver, nfe, noise_scale)


def load_any_checkpoint(
    path: Path,
    device: str = "cpu",
    solver: str | None = None,
    nfe: int | None = None,
    noise_scale: float | None = None,
) -> Checkpoint[ChunkPolicy]:
    """Load a checkpoint of any policy that can be evaluated, in evaluation mode.

    Args:
        path: Folder that LeRobot's trainer, or `save_pretrained` of policy and processors, wrote.
        device: Where to run the policy.
        solver: Another solver than the checkpoint's.
        nfe: Another number of network calls per chunk than the checkpoint's.
        noise_scale: Another standard deviation of the noise that chunks are made of than the checkpoint's.

    Raises:
        ValueError: If the folder is no checkpoint of such a policy, or device, solver, NFE or scale cannot be had.
    """
    kind = _kind(path)
    if kind not in POLICIES:
        raise ValueError(f"{path} holds a policy of type {kind!r}, expected one of {sorted(POLICIES)}")
    return _load(POLICIES[kind], path, device, solver, nfe, noise_scale)


def _load[P: ChunkPolicy](
    policy_class: type[P], path: Path, device: str, solver: str | None, nfe: int | None, noise_scale: float | None
) -> Checkpoint[P]:
    kind = _kind(path)
    if kind != policy_class.name:
        raise ValueError(f"{path} holds a policy of type {kind!r}, expected {policy_class.name!r}")
    try:
        get_safe_torch_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be had: {error}") from error
    config = PreTrainedConfig.from_pretrained(path)
    config.device = device
    own = _inference(config)
    config.set_solver(solver, nfe)
    if noise_scale is not None:
        check_noise_scale(noise_scale)
        config.noise_scale = noise_scale
    now = _inference(config)
    relation = "the checkpoint was fine-tuned through" if config.trained_through_solver else "the checkpoint's own is"
    note = "" if now == own else f"evaluating with {now}; {relation} {own}"
    processors = make_pre_post_processors(
        config, pretrained_path=str(path), preprocessor_overrides={"device_processor": {"device": device}}
    )
    policy = policy_class.from_pretrained(path, config=config, strict=True)
    return Checkpoint(path, fingerprint(path), note, policy.eval(), *processors)


def name_policies(paths: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """A name for each policy, fit for a folder: as labelled, or that of the run or folder which tells it apart.

    Raises:
        ValueError: If they are not as many as the policies, not all different, or no names of folders.
    """
    names = list(labels or ())
    if not names:
        parts = [_parts(path) for path in paths]
        for i, own in enumerate(parts):
            others = {part for j, other in enumerate(parts) if j != i for part in other}
            names.append(next((part for part in own if part not in others), own[0]))
    bad = [name for name in names if Path(name).name != name]
    if len(names) != len(paths) or len(set(names)) < len(names) or bad:
        raise ValueError(f"--label needs {len(paths)} different names that folders can have, got {names}")
    return names


def _parts(path: Path) -> list[str]:
    """Names of a checkpoint's folders, the most telling first: LeRobot's `RUN/checkpoints/STEP/pretrained_model`."""
    parts = list(path.absolute().parts)
    if parts[-1] == "pretrained_model" and parts[-3:-2] == ["checkpoints"]:
        *parts, step = parts[:-3] + parts[-2:-1]
        return [parts[-1], step, *parts[-2::-1]]
    return parts[::-1]


def fingerprint(path: Path) -> str:
    """SHA-256 over all that decides what a checkpoint does: configuration, weights, processors."""
    files = [path / "config.json", *path.glob("*.safetensors"), *path.glob("policy_*.json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def _inference(config: Any) -> str:
    calls = "" if config.nfe is None else f" at {nfe_text({'nfe': config.nfe, 'head_nfe': config.head_nfe})}"
    noise = "" if config.noise_scale == 1 else f" from noise of {config.noise_scale:g}"
    return f"{config.solver}{calls}{noise}"


def _kind(path: Path) -> str | None:
    """The type of the policy in a folder.

    Raises:
        ValueError: If it is no checkpoint, or one of its files is broken.
    """
    if not path.is_dir():
        raise ValueError(f"no checkpoint: {path} is no folder")
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        hint = f"; did you mean {path / 'pretrained_model'}?" if (path / "pretrained_model").is_dir() else ""
        raise ValueError(f"{path} is no whole checkpoint, it lacks {', '.join(missing)}{hint}")
    for file in sorted({*path.glob("*.safetensors"), *map(path.joinpath, FILES)}):
        _check_file(file)
    return json.loads((path / "config.json").read_text(encoding="utf-8")).get("type")


def _check_file(file: Path) -> None:
    """Look whether a file is whole, without reading tensors: what loads it says less of what is wrong."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        else:
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is broken, perhaps cut off when it was copied: {error}") from error
