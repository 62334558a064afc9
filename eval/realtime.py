"""Push-T in real time through LeRobot's own doors: `python eval/realtime.py --engine sync rtc async --out FILE.json`.

Each episode is one run of LeRobot's rollout (`sync`, `rtc`) or one session of its client with a policy server in
another process (`async`), on the simulated robot `fm_sim`, at 10 Hz. `--latency` adds to the time that a chunk takes.
Told are the score, the steps for which no new action had come, and how much the commanded motion jerks: by how many
pixels an action misses the straight continuation of the two before, in all steps, and in those where one chunk follows
another. (The client blends chunks, so that there is no such step.)
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

FPS = 10
ENGINES = ("sync", "rtc", "rtc:direct", "rtc:gradient", "rtc:warm_start", "async")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--policy",
        type=lambda text: Path(text).absolute(),
        help="checkpoint with 18 motors; the shipped one, renamed, if not given",
    )
    add("--engine", nargs="+", default=["sync"], choices=ENGINES, help="who runs the policy; rtc: by its own method")
    add("--latency", nargs="+", type=float, default=[0.0], help="seconds added to every chunk")
    add("--episodes", type=int, default=10, help="starts, of each engine and latency the same")
    add("--seed", type=int, default=1000, help="first start")
    add("--nfe", type=int, default=4, help="network calls per chunk")
    add("--seconds", type=float, default=30.0, help="after which an unsolved episode ends")
    add("--out", type=Path, required=True, help="JSON file to write; grows with every engine and latency")
    args = parser.parse_args()
    if args.episodes < 1 or args.seed < 0 or args.seconds <= 0 or min(args.latency) < 0:
        parser.error("--episodes and --seconds must be above 0, --seed and --latency not below 0")
    return args


class Chunks:
    """Listens to a policy and slows it down: keeps when each chunk was ready, and its actions in pixels."""

    def __init__(self, policy: Any, postprocessor: Any, latency: float) -> None:
        self.seconds: list[float] = []
        self.actions: list[Any] = []
        predict = policy.predict_action_chunk

        def listened(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            chunk = predict(*args, **kwargs)
            time.sleep(latency)
            self.seconds.append(time.perf_counter() - start)
            self.actions.append(postprocessor(chunk.clone())[0].numpy())
            return chunk

        policy.predict_action_chunk = listened


def rollout_episode(policy: Path, engine: str, latency: float, nfe: int, fm_sim: Any) -> dict[str, Any]:
    """One run of what `lerobot-rollout` runs, until the robot ends its episode."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.rollout import RolloutConfig, build_rollout_context, create_strategy
    from lerobot.rollout.inference import RTCInferenceConfig, SyncInferenceConfig

    config = PreTrainedConfig.from_pretrained(policy)
    config.pretrained_path, config.device = policy, "cpu"
    config.set_solver(None, nfe)
    name, _, method = engine.partition(":")
    config.rtc_method = method or config.rtc_method
    inference = RTCInferenceConfig(queue_threshold=8) if name == "rtc" else SyncInferenceConfig()
    cfg = RolloutConfig(
        robot=fm_sim,
        policy=config,
        inference=inference,
        fps=FPS,
        return_to_initial_position=False,
        play_sounds=False,
    )
    context = build_rollout_context(cfg, threading.Event())
    chunks = Chunks(context.policy.policy, context.policy.postprocessor, latency)
    robot = context.hardware.robot_wrapper.inner
    strategy = create_strategy(cfg.strategy)
    ending = threading.Thread(target=_wait_for_end, args=(robot, context.runtime.shutdown_event))
    try:
        strategy.setup(context)
        ending.start()
        strategy.run(context)
    finally:
        strategy.teardown(context)
    return describe(robot.episodes[0], chunks)


def _wait_for_end(robot: Any, ended: threading.Event) -> None:
    deadline = time.monotonic() + 2 * robot.config.episode_s + 10
    while not robot.episodes and time.monotonic() < deadline:
        time.sleep(0.02)
    ended.set()


@contextmanager
def policy_server(latency: float, folder: Path) -> Iterator[str]:
    """The address of a policy server in a process of its own, which takes at least `latency` for a chunk."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = found.getsockname()
    command = [sys.executable, "-m", "fm_policy.deploy.server", f"--host={address[0]}", f"--port={address[1]}"]
    command += [f"--fps={FPS}", f"--inference_latency={latency}"]
    with (folder / "server.log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as run:
        try:
            while not answers(address):
                if run.poll() is not None:
                    raise SystemExit(f"realtime.py: the policy server ended: {(folder / 'server.log').read_text()}")
                time.sleep(0.2)
            yield f"{address[0]}:{address[1]}"
        finally:
            run.kill()


def answers(address: tuple[str, int]) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as door:
        return door.connect_ex(address) == 0


def client_episode(policy: Path, address: str, fm_sim: Any) -> dict[str, Any]:
    """One session of LeRobot's client, until the robot ends its episode."""
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    settings = {"policy_type": "fm_ft", "pretrained_name_or_path": str(policy), "actions_per_chunk": 16, "fps": FPS}
    client = RobotClient(RobotClientConfig(robot=fm_sim, server_address=address, task="push", **settings))
    if not client.start():
        raise SystemExit("realtime.py: the policy server does not answer")
    threads = [threading.Thread(target=client.receive_actions)]
    threads += [threading.Thread(target=client.control_loop, args=("push",))]
    for thread in threads:
        thread.start()
    _wait_for_end(client.robot, client.shutdown_event)
    for thread in threads:
        thread.join()
    client.stop()
    return describe(client.robot.episodes[0], None)


def describe(episode: Any, chunks: Chunks | None) -> dict[str, Any]:
    """The row of an episode: its outcome, and how its commands jerk."""
    import numpy as np

    told = np.array(episode.actions)
    jerk = np.linalg.norm(told[2:] - 2 * told[1:-1] + told[:-2], axis=1)
    row = episode.row() | {"jerk": round(float(jerk.mean()), 2), "jerk_p95": round(float(np.quantile(jerk, 0.95)), 2)}
    if chunks is None:
        return row
    source = [_source(action, chunks) for action in told]
    seams = np.array([a != b for a, b in pairwise(source[1:])])
    row["chunks"] = int(seams.sum())
    row["jerk_at_seams"] = round(float(jerk[seams].mean()), 2) if seams.any() else None
    row["jerk_between"] = round(float(jerk[~seams].mean()), 2)
    row["chunk_s"] = round(float(np.median(chunks.seconds)), 3)
    return row


def _source(action: Any, chunks: Chunks) -> int:
    """The last chunk that holds an action, as it was cut to the board."""
    import numpy as np

    for number in reversed(range(len(chunks.actions))):
        if (np.abs(np.clip(chunks.actions[number], 0, 512) - action).max(axis=1) < 1e-3).any():
            return number
    return -1


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the episodes."""
    import numpy as np

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return round(float(np.mean(values)), 3) if values else None

    held, steps = sum(row["held"] for row in rows), sum(row["steps"] for row in rows)
    names = ("score", "success", "jerk", "jerk_p95", "jerk_at_seams", "jerk_between", "chunk_s")
    return {"episodes": len(rows), **{name: mean(name) for name in names}, "missed": round(held / steps, 4)}


def measure(args: argparse.Namespace, policy: Path, engine: str, latency: float, folder: Path) -> list[dict[str, Any]]:
    from env_configs import FmSimConfig

    seeds = range(args.seed, args.seed + args.episodes)
    robot = {"episode_s": args.seconds, "calibration_dir": folder / "calibration"}
    if engine != "async":
        return [rollout_episode(policy, engine, latency, args.nfe, FmSimConfig(seed=seed, **robot)) for seed in seeds]
    with policy_server(latency + (chunk_seconds(policy) if latency else 0.0), folder) as address:
        return [client_episode(policy, address, FmSimConfig(seed=seed, **robot)) for seed in seeds]


def chunk_seconds(policy: Path) -> float:
    """What a chunk takes here, without a robot beside it: the server waits until a time, and adds none."""
    import numpy as np
    import torch

    from fm_policy.evaluation.checkpoint import load_checkpoint

    checkpoint, taken = load_checkpoint(policy), []
    for _ in range(10):
        start = time.perf_counter()
        checkpoint.policy.predict_action_chunk(checkpoint.preprocessor({"observation.state": torch.full((18,), 200.0)}))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def prepared(args: argparse.Namespace, folder: Path) -> Path:
    """The policy with a robot's motors and the asked network calls, in its configuration, where the server reads it."""
    from fm_policy.assets import default_policy
    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.deploy.as_motors import as_motors

    path = folder / "policy"
    if args.policy is None:
        as_motors(default_policy(), path)
    else:
        shutil.copytree(args.policy, path)
    config = FlowMatchingConfig.from_pretrained(path)
    config.set_solver(None, args.nfe)
    config.save_pretrained(path)
    return path


def main() -> None:
    args = parse()
    if args.out.exists():
        raise SystemExit(f"realtime.py: {args.out} exists: choose another --out")
    import torch

    import lerobot_policy_fm_ft  # noqa: F401  (registers the types)
    from fm_policy.assets import default_policy
    from fm_policy.evaluation.checkpoint import load_checkpoint
    from fm_policy.evaluation.provenance import PACKAGES, describe_hardware, versions
    from fm_policy.files import write_json

    try:
        load_checkpoint(args.policy or default_policy(), nfe=args.nfe)
    except ValueError as error:
        raise SystemExit(f"realtime.py: {error}") from error
    sys.argv = sys.argv[:1]  # LeRobot's configurations read it
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "versions": versions(PACKAGES),
        "hardware": describe_hardware(torch.device("cpu")),
        "runs": [],
    }
    out = args.out.absolute()
    with tempfile.TemporaryDirectory() as name, chdir(name):  # LeRobot's client makes a folder of logs where it is
        policy = prepared(args, Path(name))
        for latency in args.latency:
            for engine in args.engine:
                rows = measure(args, policy, engine, latency, Path(name))
                run = {"engine": engine, "latency": latency, **summary(rows), "load": os.getloadavg()[0], "rows": rows}
                result["runs"].append(run)
                write_json(out, result)
                print(json.dumps({key: value for key, value in run.items() if key != "rows"}), flush=True)


if __name__ == "__main__":
    main()
