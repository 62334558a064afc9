"""The policy server in a process of its own, and LeRobot's client with the simulated robot in another."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Two sessions of LeRobot's client, one after the other; in the second the server is killed.
CLIENT = """
import json, os, signal, sys, threading, time
from pathlib import Path
import lerobot_policy_fm_ft
from env_configs import FmSimConfig
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.robot_client import RobotClient

address, policy, folder, server = sys.argv[1:]

def session(kill):
    robot = FmSimConfig(seed=2, calibration_dir=Path(folder))
    client = RobotClient(RobotClientConfig(
        policy_type="fm_ft", pretrained_name_or_path=policy, robot=robot, actions_per_chunk=8, fps=10,
        server_address=address, task="push",
    ))
    assert client.start()
    threads = [threading.Thread(target=client.receive_actions)]
    threads += [threading.Thread(target=client.control_loop, args=("push",))]
    for thread in threads:
        thread.start()
    time.sleep(3.0)
    if kill:
        os.kill(int(server), signal.SIGKILL)
        time.sleep(3.0)
    observed = client.robot.get_observation()
    client.stop()
    for thread in threads:
        thread.join()
    (episode,) = client.robot.episodes
    return {"fresh": episode.fresh, "last": list(episode.actions[-1]), "seen": [observed["x.pos"], observed["y.pos"]]}

print(json.dumps([session(False), session(True)]))
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def server(port, tmp_path):
    command = [sys.executable, "-m", "fm_policy.deploy.server", "--host=127.0.0.1", f"--port={port}", "--fps=10"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield process
        process.kill()
        process.wait()


def test_lerobots_client_acts_reconnects_and_holds_when_the_server_is_killed(server, port, motors_policy, tmp_path):
    arguments = [f"127.0.0.1:{port}", str(motors_policy), str(tmp_path / "calibration"), str(server.pid)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert sum(first["fresh"]) >= 12
    assert sum(second["fresh"][:25]) >= 8
    after = second["fresh"][-25:]
    assert sum(after) <= 8  # the rest of the last chunk, which the client hands out while it looks for a server
    assert second["seen"] == pytest.approx(second["last"], abs=30)  # it holds where it was last told to be
