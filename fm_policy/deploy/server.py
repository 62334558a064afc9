"""LeRobot's policy server, for the policies of this package: `fm-policy-server --host=127.0.0.1 --port=8080 --fps=10`.

The server computes chunks for a robot on another machine, whose program is LeRobot's own client, unchanged
(`python -m lerobot.async_inference.robot_client`). LeRobot's server knows its own types of policies only, loads no
plug-ins, and may answer no more after it failed once: this program adds what it lacks, and takes its flags.

LeRobot's client and server unpickle what they are sent: whoever reaches the port can run code. Keep it on `localhost`,
or on a network where everybody is trusted.
"""

from concurrent import futures
from typing import Any

import draccus
from lerobot.utils.import_utils import register_third_party_plugins

POLICIES = ("fm_ft",)


def make_servicer(config: Any) -> Any:
    """LeRobot's `PolicyServer`, which takes our policies, and any observation after it had no actions to give.

    LeRobot's notes an observation as done before it fails on it. Its client, which has acted out what it had, numbers
    the next ones alike; they are refused as done, and the robot holds forever, however good they are.

    Args:
        config: LeRobot's `PolicyServerConfig`.
    """
    from lerobot.async_inference import constants, policy_server  # late: it needs an extra, and rearranges logging

    # The list that the server looks its policies up in; LeRobot has no other way to add one.
    constants.SUPPORTED_POLICIES.extend(name for name in POLICIES if name not in constants.SUPPORTED_POLICIES)

    class Servicer(policy_server.PolicyServer):
        def GetActions(self, request: Any, context: Any) -> Any:  # noqa: N802
            answer = super().GetActions(request, context)
            if not getattr(answer, "data", b""):
                self.last_processed_obs = None  # without it LeRobot's server has nothing to refuse the next one for
            return answer

    return Servicer(config)


def listen(servicer: Any, address: str) -> Any:
    """Serve at `host:port` from now on; returns gRPC's server, which can be stopped and waited for.

    Raises:
        RuntimeError: If the address is taken. gRPC would share a port: one robot's client would reach another's server.
    """
    import grpc
    from lerobot.transport import services_pb2_grpc

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


def main() -> None:
    """Serve until the process is ended; the arguments are those of LeRobot's server.

    Raises:
        ImportError: If grpcio, which the server speaks, is not installed; it says how to install it.
    """
    from lerobot.async_inference.configs import PolicyServerConfig

    register_third_party_plugins()
    config = draccus.parse(PolicyServerConfig)
    servicer = make_servicer(config)
    try:
        server = listen(servicer, f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise SystemExit(f"fm-policy-server: {error}") from error
    servicer.logger.info(f"{config} serves {', '.join(POLICIES)}")
    server.wait_for_termination()


if __name__ == "__main__":
    main()
