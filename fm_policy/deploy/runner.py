"""Runs an exported policy, by `python runner.py --describe`, by `python runner.py --benchmark 1000`, or in a loop.

    runner = load()                                  # the folder of this file
    runner.reset(start=action_at_rest)
    while True:
        action = runner.act(observation, timestamp)  # one for each tick; None: there is nothing to hold yet

Needs numpy and onnxruntime. Whatever happens, `act` answers at the deadline with an action within the limits; what
happened is in `runner.events` and in the log. Only a robot that does not fit the policy raises, see `envelope.py`.

An action belongs to a tick. A chunk is made for the tick of its observation and the ticks after it, and an action
whose tick has passed is not made up for: after a refused observation the chunk is where it would have been, and of
a chunk that came late the rest of its time is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fm_policy.deploy.envelope import ConfigurationError, Envelope, Frame, Limits

FORMAT = 1
SETTINGS = "settings.json"
FIELDS = (
    *("format", "policy", "observations", "action", "noise_shape", "n_obs_steps", "chunk_length", "n_action_steps"),
    *("limits", "certificate", "versions", "graph"),
)

Compute = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]
"""Inputs of the graph, a batch of one, to the actions of a chunk, `(chunk_length, action_dim)`."""

Jobs = SimpleQueue[tuple[Future[NDArray[Any]], Mapping[str, NDArray[Any]]] | None]
"""Chunks to make, and of what; None: no more."""


class Runner:
    """History, queue and watchdog around a graph.

    Attributes:
        settings: See `settings.json`.
        envelope: What checks observations and limits actions.
        fallbacks: Ticks since the last action that was the policy's own; 0 in health.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        compute: Compute,
        noise: Callable[[tuple[int, ...]], NDArray[Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin an episode.

        Args:
            settings: As in `settings.json`.
            compute: The graph.
            noise: Source of x0, shape to array; None: standard normal, from fresh entropy.
            clock: Seconds; what `timestamp` is read from.
        """
        self.settings = settings
        self.envelope = Envelope(settings["observations"], Limits(**settings["limits"]), clock)
        self._noise = noise or np.random.default_rng().standard_normal
        self._jobs: Jobs = SimpleQueue()
        # No executor: Python waits for its threads when it ends, and a graph that hangs would keep the robot's process.
        Thread(target=_work, args=(self._jobs, compute), name="chunk", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)
        self._pending: Future[NDArray[Any]] | None = None
        self._asked = 0  # tick of its observation
        self.reset()

    @property
    def events(self) -> Counter[str]:
        """How often each kind of event happened: those of the envelope, `late`, `failed` and `fallback`."""
        return self.envelope.events

    def reset(self, start: NDArray[Any] | Sequence[float] | None = None) -> None:
        """Forget history and chunk; to be called when an episode starts.

        Args:
            start: The action at which the robot rests, see `Envelope.reset`.
        """
        self.envelope.reset(start)
        self.fallbacks = self._tick = 0
        self._history: deque[Frame] = deque(maxlen=self.settings["n_obs_steps"])
        self._chunk: NDArray[Any] = np.empty((0, len(self.envelope.limits.low)))
        self._begin = -int(self.settings["n_action_steps"])  # tick of the chunk's first action
        if self._pending is not None:
            self._pending.cancel()
        self._pending = None  # if it runs already, the worker finishes it for nobody

    def act(self, observation: Mapping[str, Any] | None, timestamp: float | None = None) -> NDArray[np.float64] | None:
        """The action of this tick, by the deadline.

        Args:
            observation: One value for each feature: numbers, or uint8 pictures (height, width, channels).
            timestamp: When it was made, on the runner's clock; its age is not checked without.

        Returns:
            `(action_dim,)` in the robot's units; None if there is no action yet that could be held.

        Raises:
            ConfigurationError: If the first observations do not fit the policy.
        """
        frame = self.envelope.admit(observation, timestamp)
        if frame is not None:
            missing = 1 if self._history else self.settings["n_obs_steps"]
            self._history.extend([frame] * missing)
            if self._place() >= self.settings["n_action_steps"]:
                self._plan()
        action = self._own() if frame is not None else None
        self.fallbacks = 0 if action is not None else self.fallbacks + 1
        action = action if action is not None else self._fallback()
        self._tick += 1
        return self.envelope.limit(action)

    def _place(self) -> int:
        """The place of this tick in the chunk."""
        return self._tick - self._begin

    def _own(self) -> NDArray[Any] | None:
        place = self._place()
        return self._chunk[place] if place < min(self.settings["n_action_steps"], len(self._chunk)) else None

    def _plan(self) -> None:
        """Have a chunk computed, or wait on for the late one, until the deadline."""
        if self._pending is None or (
            self._pending.done() and self._tick - self._asked >= self.settings["n_action_steps"]
        ):
            self._asked, self._pending = self._tick, Future()
            self._jobs.put((self._pending, self._inputs()))
        deadline = self.envelope.limits.deadline
        wait([self._pending], deadline)
        if not self._pending.done():
            self.envelope.count("late", f"no chunk within {deadline} s, asked for {self._tick - self._asked} ticks ago")
            return
        done, self._pending = self._pending, None
        try:
            self._chunk, self._begin = self._checked(done.result()), self._asked
        except Exception as error:
            self.envelope.count("failed", f"no chunk: {error!r}")

    def _checked(self, chunk: NDArray[Any]) -> NDArray[np.float64]:
        """The chunk, if it is one: numpy would make actions of other shapes, too."""
        checked = np.asarray(chunk, np.float64)
        if checked.shape != (expected := (self.settings["chunk_length"], len(self.envelope.limits.low))):
            raise ValueError(f"expected actions of the shape {expected}, got {checked.shape}")
        if not np.isfinite(checked).all():
            raise ValueError("it holds NaN or infinity")
        return checked

    def _inputs(self) -> dict[str, NDArray[Any]]:
        frames = list(self._history)
        inputs = {name: np.stack([frame[name] for frame in frames])[None] for name in frames[-1]}
        return inputs | {"noise": np.asarray(self._noise(tuple(self.settings["noise_shape"])), np.float32)[None]}

    def _fallback(self) -> NDArray[Any] | None:
        kind, place = self.envelope.limits.fallback, self._place()
        self.envelope.count("fallback", f"{kind}, tick {self._tick}")
        if kind == "zero":
            return np.zeros(len(self.envelope.limits.low))
        return self._chunk[place] if kind == "rest" and place < len(self._chunk) else self.envelope.last


def _work(jobs: Jobs, compute: Compute) -> None:
    """Make chunks one after the other, until there is None to make."""
    while job := jobs.get():
        chunk, inputs = job
        if chunk.set_running_or_notify_cancel():
            try:
                chunk.set_result(compute(inputs))
            except BaseException as error:
                chunk.set_exception(error)


def load(
    folder: Path | str = Path(__file__).parent,
    compute: Compute | None = None,
    action_names: Sequence[str] | None = None,
    threads: int = 1,
    noise: Callable[[tuple[int, ...]], NDArray[Any]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **limits: Any,
) -> Runner:
    """The runner of an exported folder.

    Args:
        folder: The folder.
        compute: What runs the graph; ONNX Runtime if not given.
        action_names: What the robot calls the numbers of an action, in its order.
        threads: Threads of ONNX Runtime.
        noise: See `Runner`.
        clock: See `Runner`.
        limits: Fields of `Limits` to set otherwise than in `settings.json`.

    Raises:
        ConfigurationError: If the folder is not whole or not of this format, a limit makes no sense, or the robot
            names its actions otherwise than the policy's data.
    """
    settings = read_settings(Path(folder))
    settings["limits"] |= limits
    known = {field.name for field in dataclasses.fields(Limits)}
    if unknown := set(settings["limits"]) - known:
        raise ConfigurationError(f"unknown limits {sorted(unknown)}: expected some of {sorted(known)}")
    names = settings["action"]["names"]
    if action_names is not None and list(action_names) != names:
        raise ConfigurationError(f"the policy is of another robot: its actions are {names}, got {list(action_names)}")
    return Runner(settings, compute or onnx_session(Path(folder), settings, threads), noise, clock)


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json`, if the graph beside it is the one that it was written with."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if missing := [name for name in FIELDS if name not in settings]:
            raise KeyError(*missing)
        graph, expected = (folder / settings["graph"]["file"]).read_bytes(), settings["graph"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{folder} is no whole exported policy: {error!r}") from error
    if settings["format"] != FORMAT:
        raise ConfigurationError(f"{folder} has the format {settings['format']}, this runner reads {FORMAT}")
    if hashlib.sha256(graph).hexdigest() != expected:
        raise ConfigurationError(f"{settings['graph']['file']} is not the graph that {SETTINGS} was written with")
    return settings


def onnx_session(folder: Path, settings: Mapping[str, Any], threads: int) -> Compute:
    """The graph in ONNX Runtime."""
    import onnxruntime  # type: ignore[import-untyped]

    file = settings["graph"]["file"]
    if not file.endswith(".onnx"):
        raise ConfigurationError(f"{file} is not for ONNX Runtime: load it yourself, and give its call as `compute`")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["actions"], dict(inputs))[0][0]


def blank(settings: Mapping[str, Any]) -> Frame:
    """An observation of zeros."""
    features = settings["observations"].items()
    return {name: np.zeros(f["shape"], np.uint8 if f["kind"] == "image" else np.float32) for name, f in features}


def describe(settings: Mapping[str, Any]) -> str:
    """What a folder expects and promises, as text."""
    policy, limits, certificate = settings["policy"], settings["limits"], settings["certificate"]
    names, steps = settings["action"]["names"] or "", settings["n_obs_steps"]
    lines = [
        f"policy {policy['type']} ({policy['velocity_net']}, stage {policy['stage']}) of {policy['fingerprint'][:12]}",
        f"{policy['solver']}, {policy['nfe']} network calls, {policy['head_nfe']} of the head {policy['head'] or ''}",
        *(f"expects {name}: {f['kind']} {tuple(f['shape'])}" for name, f in settings["observations"].items()),
        f"sees {steps} observations, executes {settings['n_action_steps']} of {settings['chunk_length']} actions",
        f"promises actions {names} of {len(limits['low'])} numbers, in double precision",
        *(f"limit {name}: {value}" for name, value in limits.items()),
        *(f"certificate: {claim}" for claim in (certificate["claims"] if certificate else [])),
        f"made with {settings['versions']}",
    ]
    return "\n".join(lines)


def benchmark(folder: Path, chunks: int) -> str:
    """Time chunks with one thread, from an observation to an action, and a cold start in a process of its own.

    Seconds of the processor are told beside those of the wall, for a machine that others use too.
    """
    import resource

    read_settings(folder)  # told at once, and by name, if it is not whole
    first = "import runner; r = runner.load(deadline=None); assert r.act(runner.blank(r.settings)) is not None"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", first], cwd=folder, check=True)
    cold, child = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    runner, seconds = load(folder, deadline=None), np.empty((chunks, 2))
    for n in range(chunks):
        runner.reset()
        before = np.array([time.perf_counter(), time.process_time()])
        runner.act(blank(runner.settings))
        seconds[n] = np.array([time.perf_counter(), time.process_time()]) - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    lines = [f"{chunks} chunks on one thread"]
    for kind, row in zip(("wall", "processor"), 1e3 * np.quantile(seconds, [0.5, 0.99, 1.0], axis=0).T, strict=True):
        lines.append("  {}: p50 {:.2f} ms, p99 {:.2f} ms, worst {:.2f} ms".format(kind, *row))
    lines.append("cold start, from a new process to its first action")
    lines.append(f"  wall: {cold:.2f} s\n  processor: {child.ru_utime + child.ru_stime:.2f} s")
    return "\n".join([*lines, f"peak memory: {peak:.0f} MiB"])


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--describe", action="store_true", help="print what the folder expects and promises")
    parser.add_argument("--benchmark", type=int, metavar="N", help="time N chunks")
    args = parser.parse_args()
    if args.benchmark is not None and args.benchmark < 1:
        parser.error(f"--benchmark needs at least 1 chunk, got {args.benchmark}")
    folder = Path(__file__).resolve().parent
    try:
        if args.describe or args.benchmark is None:
            print(describe(read_settings(folder)))
        if args.benchmark is not None:
            print(benchmark(folder, args.benchmark))
    except ConfigurationError as error:
        raise SystemExit(f"runner.py: {error}") from error


if __name__ == "__main__":
    main()
