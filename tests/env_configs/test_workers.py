"""Workers: the order of what they answer, and that they end."""

import subprocess
import sys
import time
from functools import partial
from itertools import islice

import psutil
import pytest

from env_configs.demos.workers import in_order

PROGRAM = """
import os, time
from pathlib import Path
from env_configs.demos.workers import in_order

def sleep(seed):
    Path(f"{os.getpid()}.pid").touch()
    time.sleep(3600)

if __name__ == "__main__":
    next(in_order(sleep, 0, 2, []))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_come_in_the_order_of_the_seeds(workers):
    answers = in_order(partial(pow, 2), 3, workers, [])
    assert list(islice(answers, 6)) == [(seed, 2**seed) for seed in range(3, 9)]
    answers.close()


def test_workers_end_with_a_program_that_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path)
    try:
        workers = wait_for(lambda: len(found := list(tmp_path.glob("*.pid"))) == 2 and found, seconds=300)
    finally:
        program.kill()
        program.wait()
    wait_for(lambda: not any(is_running(int(pid.stem)) for pid in workers), seconds=60)


def wait_for(condition, seconds: float):
    """What the condition returns as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain")


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
