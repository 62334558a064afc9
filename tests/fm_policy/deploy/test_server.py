"""The policy server in a process of its own, and LeRobot's client with the simulated robot in another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A server, and two sessions of LeRobot's client, one after the other; in the second the server is killed. (A server
# that is forked off after LeRobot is imported starts ten seconds earlier.)
SESSIONS = """
import json, os, signal, socket, sys, threading, time
from pathlib import Path
import lerobot_policy_fm_ft
import fm_policy.modeling_fm_ft
from env_configs import FmSimConfig
from fm_policy.deploy import server
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.robot_client import RobotClient

port, policy, folder = sys.argv[1:]
process = os.fork()
if process == 0:
    sys.argv = ["fm-policy-server", "--host=127.0.0.1", f"--port={port}", "--fps=10"]
    server.main()
while socket.socket().connect_ex(("127.0.0.1", int(port))):
    time.sleep(0.1)


def session(actions, kill):
    robot = FmSimConfig(seed=2, calibration_dir=Path(folder))
    client = RobotClient(RobotClientConfig(
        policy_type="fm_ft", pretrained_name_or_path=policy, robot=robot, actions_per_chunk=8, fps=10,
        server_address=f"127.0.0.1:{port}", task="push",
    ))
    assert client.start()
    threads = [threading.Thread(target=client.receive_actions)]
    threads += [threading.Thread(target=client.control_loop, args=("push",))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while sum(client.robot._world.episode.fresh) < actions and time.monotonic() < end:
        time.sleep(0.1)
    if kill:
        os.kill(process, signal.SIGKILL)
        time.sleep(3.0)
    observed = client.robot.get_observation()
    client.stop()
    for thread in threads:
        thread.join()
    (episode,) = client.robot.episodes
    return {"fresh": episode.fresh, "last": list(episode.actions[-1]), "seen": [observed["x.pos"], observed["y.pos"]]}


print(json.dumps([session(12, kill=False), session(8, kill=True)]))
"""


def test_a_port_belongs_to_one_server(port):
    """One robot's client would reach another one's server, and reset it."""
    from lerobot.async_inference.configs import PolicyServerConfig

    from fm_policy.deploy.server import listen, make_servicer

    first = listen(make_servicer(PolicyServerConfig(port=port)), f"127.0.0.1:{port}")
    try:
        with pytest.raises(RuntimeError, match=f"address 127.0.0.1:{port}"):
            listen(make_servicer(PolicyServerConfig(port=port)), f"127.0.0.1:{port}")
    finally:
        first.stop(None)


def test_lerobots_client_acts_reconnects_and_holds_when_the_server_is_killed(port, motors_policy, tmp_path):
    command = [sys.executable, "-c", SESSIONS, str(port), str(motors_policy), str(tmp_path / "calibration")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    logs = tmp_path / "log"
    with logs.open("w") as log:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, logs.read_text()[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert sum(first["fresh"][:30]) >= 12
    assert sum(second["fresh"][:25]) >= 8
    after = second["fresh"][-25:]
    assert sum(after) <= 8  # the rest of the last chunk, which the client hands out while it looks for a server
    assert second["seen"] == pytest.approx(second["last"], abs=30)  # it holds where it was last told to be
