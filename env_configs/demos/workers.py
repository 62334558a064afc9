"""Processes that try one seed after the other."""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from threading import Thread


def in_order[Result](
    try_one: Callable[[int], Result], seed: int, workers: int, preload: Sequence[str]
) -> Iterator[tuple[int, Result]]:
    """Seeds and what came of them, without end; a few are under way ahead of the one that is asked for.

    Args:
        try_one: what is done with a seed; where there are several workers it must be picklable.
        seed: the first one.
        workers: processes; with one, everything happens in this one.
        preload: modules that are imported once for all workers, not once in each.
    """
    if workers == 1:
        for number in itertools.count(seed):
            yield number, try_one(number)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(workers, mp_context=server, initializer=_end_with_the_program)
    try:
        ahead: deque[tuple[int, Future[Result]]] = deque()
        while True:
            while len(ahead) < 2 * workers:
                ahead.append((seed, pool.submit(try_one, seed)))
                seed += 1
            number, future = ahead.popleft()
            yield number, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_the_program() -> None:
    """See that a worker does not outlive its program: killed, that one leaves it waiting for a seed for ever."""
    program = multiprocessing.parent_process()
    assert program is not None  # this runs in a worker

    def follow() -> None:
        program.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
