"""The runner's queue, history, fallbacks and watchdog, around a graph whose actions say where they come from."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fm_policy.deploy.envelope import ConfigurationError
from fm_policy.deploy.runner import Runner

SETTINGS = {
    "observations": {"observation.state": {"kind": "numbers", "shape": [1]}},
    "noise_shape": [8, 1],
    "n_obs_steps": 2,
    "chunk_length": 7,
    "n_action_steps": 3,
    "limits": {
        "low": [-1000.0],
        "high": [1000.0],
        "step": [1000.0],
        "velocity": None,
        "max_age": 0.5,
        "max_frozen": 1.0,
        "deadline": 5.0,
        "fallback": "hold",
    },
}


class Graph:
    """Answers the latest number x that was observed by the chunk x, x + 0.1, ..., x + 0.6; waits while told to."""

    def __init__(self) -> None:
        self.inputs: list[dict] = []
        self.go, self.answers = threading.Event(), threading.Semaphore(0)
        self.go.set()

    def __call__(self, inputs):
        self.inputs.append(dict(inputs))
        assert self.go.wait(10)
        self.answers.release()
        return inputs["observation.state"][0, -1] + 0.1 * np.arange(7)[:, None]


@pytest.fixture
def graph() -> Graph:
    return Graph()


def make(graph, **limits) -> Runner:
    return Runner(SETTINGS | {"limits": SETTINGS["limits"] | limits}, graph)


def act(runner, number) -> float | None:
    action = runner.act({"observation.state": [number]})
    return None if action is None else round(float(action[0]), 6)


BAD = float("nan")


def test_a_chunk_is_executed_for_n_action_steps(graph):
    runner = make(graph)
    assert [act(runner, x) for x in range(7)] == [0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 6.0]
    assert runner.events == {}
    assert runner.fallbacks == 0


def test_the_history_begins_with_the_first_observation_repeated_and_reset_forgets_it(graph):
    runner = make(graph)
    for x in range(4):
        act(runner, x)
    runner.reset()
    act(runner, 9)
    histories = [inputs["observation.state"][0, :, 0].tolist() for inputs in graph.inputs]
    assert histories == [[0, 0], [2, 3], [9, 9]]
    assert graph.inputs[0]["observation.state"].shape == (1, 2, 1)
    assert graph.inputs[0]["noise"].shape == (1, 8, 1)


def test_the_noise_is_new_for_each_chunk_and_standard_normal():
    drawn = []
    settings = SETTINGS | {"noise_shape": [500, 4]}
    runner = Runner(settings, lambda inputs: drawn.append(inputs["noise"]) or np.zeros((7, 1)))
    for _ in range(2):
        runner.reset()
        act(runner, 0)
    assert (drawn[0] != drawn[1]).all()
    assert drawn[0].dtype == np.float32
    assert abs(drawn[0].mean()) < 0.1 and abs(drawn[0].std() - 1) < 0.1


def test_a_refused_observation_holds_the_last_action_while_the_chunk_goes_on(graph):
    runner = make(graph)
    assert [act(runner, x) for x in (0, BAD, 2)] == [0.0, 0.0, 0.2]
    assert runner.events == {"not_finite": 1, "fallback": 1}
    assert act(runner, 3) == 3.0
    assert graph.inputs[-1]["observation.state"][0, :, 0].tolist() == [2, 3]


def test_fallbacks_in_a_row_are_told(graph):
    runner = make(graph)
    counts = []
    for x in (0, BAD, BAD, 3):
        act(runner, x)
        counts.append(runner.fallbacks)
    assert counts == [0, 1, 2, 0]


def test_the_rest_of_the_chunk_and_then_its_last_action(graph):
    runner = make(graph, fallback="rest")
    assert [act(runner, x) for x in (0, 1, *[BAD] * 7, 9)] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 9.0]


def test_zero_for_actions_that_are_velocities(graph):
    runner = make(graph, fallback="zero", step=[3.0])
    assert [act(runner, x) for x in (5, BAD, BAD)] == [5.0, 2.0, 0.0]


def test_before_there_is_an_action_there_is_none_but_the_start(graph):
    runner = make(graph)
    assert act(runner, BAD) is None
    runner.reset(start=[7.0])
    assert act(runner, BAD) == 7.0
    assert act(runner, 1) == 1.0


def test_a_late_chunk_is_answered_at_the_deadline_and_used_for_the_rest_of_its_time(graph):
    runner = make(graph, deadline=0.3)
    for x in range(3):
        act(runner, x)
    graph.go.clear()
    start = time.perf_counter()
    assert act(runner, 3) == 0.2  # the last action is held
    assert 0.3 <= time.perf_counter() - start < 2.0
    graph.go.set()
    assert [act(runner, x) for x in (4, 5)] == [3.1, 3.2]  # of the chunk for 3, whose first action is past
    assert act(runner, 6) == 6.0
    assert runner.events == {"late": 1, "fallback": 1}
    assert len(graph.inputs) == 3


def test_a_chunk_that_comes_after_its_time_is_discarded(graph):
    runner = make(graph, deadline=0.3)
    graph.go.clear()
    assert [act(runner, x) for x in range(4)] == [None] * 4
    graph.go.set()
    assert graph.answers.acquire(timeout=10)
    time.sleep(0.05)
    assert act(runner, 4) == 4.0
    assert len(graph.inputs) == 2  # while one was computed, no other was asked for


def test_a_chunk_for_the_episode_before_is_discarded(graph):
    runner = make(graph, deadline=0.3)
    graph.go.clear()
    act(runner, 0)
    runner.reset()
    graph.go.set()
    assert act(runner, 5) == 5.0


def test_without_a_deadline_it_waits(graph):
    runner = make(graph, deadline=None)
    graph.go.clear()
    threading.Timer(0.2, graph.go.set).start()
    assert act(runner, 1) == 1.0
    assert runner.events == {}


def test_a_fault_in_the_graph_is_an_event():
    def fail(inputs):
        raise RuntimeError("out of memory")

    runner = Runner(SETTINGS, fail)
    runner.reset(start=[1.0])
    assert act(runner, 0) == 1.0
    assert runner.events == {"failed": 1, "fallback": 1}


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_chunk_that_is_not_finite_is_no_chunk(number):
    runner = Runner(SETTINGS, lambda inputs: np.full((7, 1), number))
    assert act(runner, 0) is None
    assert runner.events == {"failed": 1, "fallback": 1}


@pytest.mark.parametrize("shape", [(1, 7, 1), (7,), (7, 2), (6, 1), (0, 1)])
def test_a_chunk_of_another_shape_is_no_chunk(shape):
    """numpy would make one number of it for both joints, or an action of many actions."""
    runner = Runner(SETTINGS, lambda inputs: np.zeros(shape))
    runner.reset(start=[1.0])
    assert act(runner, 0) == 1.0
    assert runner.events == {"failed": 1, "fallback": 1}


@pytest.mark.parametrize("chunk", [None, "go", [[1.0], [2.0, 3.0]]])
def test_what_is_no_chunk_at_all_is_none_either(chunk):
    runner = Runner(SETTINGS, lambda inputs: chunk)
    assert act(runner, 0) is None
    assert runner.events == {"failed": 1, "fallback": 1}


def test_a_graph_that_hangs_does_not_keep_the_process_from_ending():
    script = f"""
import threading
from fm_policy.deploy.runner import Runner
settings = {SETTINGS!r}
settings["limits"]["deadline"] = 0.1
runner = Runner(settings, lambda inputs: threading.Event().wait())
assert runner.act({{"observation.state": [1.0]}}) is None and runner.events["late"] == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_worker_ends_with_its_runner(graph):
    others = set(threading.enumerate())
    runner = make(graph)
    assert act(runner, 1) == 1.0
    (worker,) = set(threading.enumerate()) - others
    del runner
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


def test_another_robot_is_refused(graph):
    with pytest.raises(ConfigurationError, match="lacks 'observation.state'"):
        make(graph).act({"observation.velocity": [1.0]})
