"""Several processes that share the episodes of an evaluation.

`torch.distributed.run`, or any launcher that speaks its language (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), starts
one program several times, on one machine or on several that see the same folder; `companions` does so on this machine.
Each process is told its rank here. Nothing but waiting for one another goes over the network: rows go to files.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

MEETING = timedelta(minutes=5)
"""How long a process waits for the others to start."""

PATIENCE = timedelta(days=30)
"""How long a process waits for the others' episodes; that one of them has ended is noticed at once."""


class Rank(NamedTuple):
    """Which of the processes that share an evaluation this one is.

    Attributes:
        number: From 0 on.
        processes: How many there are.
        group: Of torch.distributed, whose processes wait with patience; the default one waits as long as for a start.
    """

    number: int = 0
    processes: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares, joins and tells."""
        return self.number == 0

    def share[T](self, jobs: Sequence[T]) -> Sequence[T]:
        """Every `processes`-th job: the shares are disjoint, together all jobs, and equally long within 1."""
        return jobs[self.number :: self.processes]

    def wait(self) -> None:
        """Return when every process has come here.

        Raises:
            ConnectionError: If one of them has ended instead.
        """
        if self.processes == 1:
            return
        try:
            dist.monitored_barrier(self.group, timeout=PATIENCE)
        except RuntimeError as error:
            raise ConnectionError(
                f"another of the {self.processes} processes ended early ({error}); its rows are kept, to be resumed"
            ) from error


ALONE = Rank()


def join() -> Rank:
    """Find the other processes, if this one was started as one of several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=MEETING)
    return Rank(dist.get_rank(), count, dist.new_group(timeout=PATIENCE))


@contextmanager
def companions(processes: int) -> Iterator[None]:
    """Run this very program, with its arguments, in `processes - 1` further processes beside this one, the first.

    Does nothing in a process that is one of several already. If this process fails, the others are ended. They share
    the cores, unless OMP_NUM_THREADS is set.

    Raises:
        ValueError: If `processes` is below 1.
        ConnectionError: If one of the others fails.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1 or "WORLD_SIZE" in os.environ:
        yield
        return
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    os.environ |= meeting | {"RANK": "0"}
    threads = _share_cores(processes)
    others = [_start(rank, threads) for rank in range(1, processes)]
    try:
        yield
        failed = [rank for rank, other in enumerate(others, start=1) if other.wait()]
        if failed:
            raise ConnectionError(f"of {processes} processes these failed: {failed}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for other in others:
            other.terminate()
            other.wait()
        for name in (*meeting, "RANK"):
            del os.environ[name]


def cores() -> int:
    """Of the machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_cores(processes: int) -> int:
    """Give this process its share of torch's threads, unless the user did, and return how many those are.

    Left alone, each of them starts one for every core, and they wait for one another: two processes on two cores are
    then slower than one.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // processes))
    return torch.get_num_threads()


def _start(rank: int, threads: int) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, *sys.argv], env=os.environ | own)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
