"""What a result was made with."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import draccus
import torch
from lerobot.envs.configs import EnvConfig

from fm_policy.evaluation.ranks import cores

PACKAGES = ("lerobot_policy_fm_ft", "lerobot", "torch", "numpy", "gymnasium")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of some distributions; those that are not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_task(env_config: EnvConfig, packages: Iterable[str]) -> dict[str, Any]:
    """Every setting of a task, the versions of its simulator's packages, and a fingerprint of both."""
    task = {
        "type": env_config.type,
        "config": json.loads(json.dumps(draccus.encode(env_config))),
        "versions": versions(packages),
    }
    content = json.dumps(task, sort_keys=True).encode()
    return {**task, "fingerprint": hashlib.sha256(content).hexdigest()}


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores that this process may use, torch's threads, and the device of the policy."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": name,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
