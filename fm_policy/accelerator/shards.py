"""Home from the accelerator: averaged weights in half precision, in files that are small enough to be carried.

`model.safetensors.index.json` lists them as the Hugging Face Hub's sharded models do. Put together again at home,
they are an ordinary checkpoint of `fm_ft`, or of `dp_ema` if the method was `ddpm`.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_policy.accelerator import diffusion
from fm_policy.accelerator.data import IMAGE, IMAGENET
from fm_policy.accelerator.training import AVERAGE_FILE, STATE_FILE
from fm_policy.average import halved
from fm_policy.files import check_free, new_folder, part, read_tensors, write_json, write_tensors

INDEX = "model.safetensors.index.json"
LIMIT = 16 * 2**20
HEADER = 2**16  # bytes of a shard that are kept for names and shapes


def home(run: Path, out: Path, limit: int = LIMIT) -> tuple[int, int]:
    """Write the averaged weights of a training as shards; of an unfinished one as they are by now.

    Args:
        run: Folder of the training.
        out: Folder for the shards, absent or empty.
        limit: Most bytes of a file.

    Returns:
        The step that they are of, and all steps of the training.

    Raises:
        ValueError: If the folder holds no training, or a weight is larger than a shard or too large for float16.
    """
    files = [run / name for name in (AVERAGE_FILE, STATE_FILE) if (run / name).is_file()]
    if not files:
        raise ValueError(f"no training in {run}: it has neither {AVERAGE_FILE} nor {STATE_FILE}")
    tensors, about = read_tensors(files[0])
    halves = {name: halved(name, weight) for name, weight in part(tensors, "average.").items()}
    write_shards(halves, about, out, limit)
    return about["step"], about["plan"]["steps"]


def write_shards(tensors: Mapping[str, Tensor], about: Mapping[str, Any], out: Path, limit: int) -> None:
    """Write tensors to `out`, as many to a file as fit into it, and the index.

    Raises:
        ValueError: If `out` is not empty, or a tensor does not fit into a file.
    """
    check_free(out)
    shards: list[dict[str, Tensor]] = [{}]
    room = limit - HEADER
    for name, tensor in tensors.items():
        if tensor.nbytes > limit - HEADER:
            raise ValueError(f"'{name}' takes {tensor.nbytes} bytes, a shard has room for {limit - HEADER}")
        if tensor.nbytes > room:
            shards.append({})
            room = limit - HEADER
        shards[-1][name] = tensor
        room -= tensor.nbytes
    with new_folder(out) as draft:
        names = {n: f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)}
        for n, shard in enumerate(shards, 1):
            write_tensors(draft / names[n], shard, {"shard": n})
        weight_map = {name: names[n] for n, shard in enumerate(shards, 1) for name in shard}
        write_json(draft / INDEX, {"metadata": dict(about), "weight_map": weight_map})


def read_shards(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_shards` wrote.

    Raises:
        ValueError: If the index, a shard or a weight is missing.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"no shards in {folder}: it has no {INDEX}")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    weight_map = index["weight_map"]
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names")
    tensors = {name: tensor for file in files for name, tensor in read_tensors(folder / file)[0].items()}
    if tensors.keys() != weight_map.keys():
        raise ValueError(f"weights of {folder} are not its index's: {sorted(tensors.keys() ^ weight_map.keys())}")
    return {name: tensors[name] for name in weight_map}, index["metadata"]


def assemble(folder: Path, out: Path) -> None:
    """Make a checkpoint of shards, processors included, that LeRobot and `eval/rollout.py` load. Needs LeRobot.

    Args:
        folder: The shards.
        out: The checkpoint, absent or empty.

    Raises:
        ValueError: As `read_shards`, or if `out` is not empty.
    """
    from lerobot.configs import PreTrainedConfig

    from fm_policy.evaluation.policies import POLICIES
    from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

    check_free(out)
    weights, about = read_shards(folder)
    weights = {name: weight.float() for name, weight in weights.items()}
    diffuses = about["plan"]["method"] == "ddpm"
    settings = diffusion_settings(about["plan"]["policy"]) if diffuses else about["plan"]["policy"]
    with new_folder(out) as draft:
        write_json(draft / "config.json", settings | {"device": "cpu"} | ({} if diffuses else {"use_ema": False}))
        config = PreTrainedConfig.from_pretrained(draft)
        policy = POLICIES[config.type](config)
        modules = [policy.diffusion, policy.ema_diffusion] if diffuses else [policy.net]
        for module in modules:
            constants = dict(module.named_buffers())
            module.load_state_dict(diffusion.as_lerobots(weights) | constants if diffuses else weights)
        policy.training_steps.fill_(about["step"])
        policy.save_pretrained(draft)
        for processor in make_fm_ft_pre_post_processors(config, _statistics(about["data"]["statistics"])):
            processor.save_pretrained(draft)


def _statistics(numbers: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Tensor]]:
    kinds = {name: {kind: torch.tensor(values) for kind, values in kept.items()} for name, kept in numbers.items()}
    return kinds | {IMAGE: {kind: torch.tensor(values).view(3, 1, 1) for kind, values in IMAGENET.items()}}


def diffusion_settings(policy: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of LeRobot's diffusion policy whose net has the shape of ours, as JSON. Needs LeRobot."""
    from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig

    known = {field.name for field in fields(DiffusionEmaConfig)}
    shared = {name: value for name, value in policy.items() if name in known}
    levels = {"num_train_timesteps": diffusion.STEPS, "num_inference_steps": diffusion.STEPS}
    noise = {"noise_scheduler_type": "DDPM", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    return shared | levels | noise | {"type": "dp_ema", "diffusion_step_embed_dim": policy["time_embed_dim"]}
