"""LeRobot's policy server, which answers again once it can. Importing this needs grpcio, and rearranges logging."""

import logging
from concurrent import futures
from dataclasses import asdict
from pprint import pformat
from typing import Any

import draccus
import grpc
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.transport import services_pb2_grpc


class AsyncServer(PolicyServer):
    """LeRobot's server, which takes any observation after it had no actions to give.

    LeRobot's notes an observation as done before it fails on it. Its client, which has acted out what it had, numbers
    the next ones alike; they are refused as done, and the robot holds forever, however good they are.
    """

    def GetActions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The chunk for the newest observation, or an answer without data."""
        answer = super().GetActions(request, context)
        if not getattr(answer, "data", b""):
            self.last_processed_obs = None  # without it LeRobot's server compares with nothing
        return answer


def listen(servicer: PolicyServer, address: str) -> grpc.Server:
    """Serve at `host:port` from now on, until the returned server is stopped."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


@draccus.wrap()
def serve(cfg: PolicyServerConfig) -> None:
    """Serve until the process is ended; the arguments are those of LeRobot's server."""
    logging.info(pformat(asdict(cfg)))
    servicer = AsyncServer(cfg)
    server = listen(servicer, f"{cfg.host}:{cfg.port}")
    servicer.logger.info(f"PolicyServer started on {cfg.host}:{cfg.port}")
    server.wait_for_termination()
