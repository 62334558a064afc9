"""The Kitchen environment: its layouts, actions, information and refusals, and that a seed decides an episode."""

import ctypes.util
import sys
from dataclasses import dataclass
from types import ModuleType

import draccus
import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import env_to_policy_features, preprocess_observation

from env_configs import make_env_config
from env_configs.kitchen import FmKitchenEnv, Kitchen
from env_configs.kitchen_tasks import JOINT_LIMITS, LAYOUTS, NEAR, REACH, SCORED, TASKS, done_now, score

franka_kitchen = pytest.importorskip(
    "gymnasium_robotics.envs.franka_kitchen.kitchen_env", reason="needs the extra kitchen"
)


@pytest.fixture(scope="module")
def env() -> gym.Env:
    """One environment for all tests that reset it themselves."""
    return FmKitchenEnv(episode_length=1000).make()


@pytest.fixture(scope="module")
def theirs() -> gym.Env:
    """The bare simulator."""
    return franka_kitchen.KitchenEnv()


def actions(seed: int, steps: int) -> np.ndarray:
    """Joint targets around the start, some of them out of reach."""
    start = np.array([0.15, -1.77, 1.84, -2.48, 0.26, 0.71, 1.6, 0.02, 0.02])
    return start + np.random.default_rng(seed).normal(size=(steps, 9)) * 0.2


def episode(env: gym.Env, seed: int, steps: int = 6) -> list[np.ndarray]:
    """Every observation and reward of some scripted steps."""
    seen, _ = env.reset(seed=seed)
    trace = [*seen.values()]
    for action in actions(seed, steps):
        seen, reward, *_ = env.step(action)
        trace += [*seen.values(), np.asarray(reward)]
    return trace


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_said_of_the_simulator_is_the_simulators(theirs):
    robot = theirs.robot_env
    np.testing.assert_array_equal(JOINT_LIMITS, robot.robot_pos_bound[:9])
    assert pytest.approx(2 * robot.dt) == REACH
    assert NEAR == franka_kitchen.BONUS_THRESH
    assert {name.replace(" ", "_") for name in franka_kitchen.OBS_ELEMENT_GOALS} == set(TASKS)
    for name, (index, goal) in TASKS.items():
        np.testing.assert_array_equal(index, franka_kitchen.OBS_ELEMENT_INDICES[name.replace("_", " ")])
        np.testing.assert_array_equal(goal, franka_kitchen.OBS_ELEMENT_GOALS[name.replace("_", " ")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_benchmarks(layout, theirs):
    seen, _ = Kitchen(layout=layout).reset(seed=3)
    observed = theirs.reset(seed=3)[0]["observation"]
    joined = np.concatenate([seen["agent_pos"], seen["environment_state"]])
    positions = np.concatenate([observed[:9], observed[18:39]])
    wanted = {"relay": np.concatenate([positions, np.zeros(30)]), "d4rl": observed}[layout]
    np.testing.assert_array_equal(joined, wanted)


def test_joint_targets_are_what_the_servos_get(env):
    """a = (target - observed) / 0.16: the noise cancels; what is out of reach is cut to 0.16, then to the limits."""
    seen, _ = env.reset(seed=0)
    data = env.unwrapped.data
    near = seen["agent_pos"] + 0.15 * np.array([1, 1, -1, 1, -1, 1, -1, 0, 0])
    near[7:] = 0.01, 0.03
    env.step(near)
    np.testing.assert_allclose(data.ctrl, near, atol=1e-12)
    seen, _ = env.reset(seed=1)
    env.step(seen["agent_pos"] + 5)
    cut = np.minimum(seen["agent_pos"] + REACH, JOINT_LIMITS[:, 1])
    np.testing.assert_allclose(data.ctrl, cut, atol=1e-12)
    assert cut[7] == 0.04


def test_velocities_are_the_simulators_own_actions(theirs):
    env = FmKitchenEnv(actions="velocity", layout="d4rl").make()
    env.reset(seed=5)
    theirs.reset(seed=5)
    for action in np.random.default_rng(0).uniform(-1.5, 1.5, (5, 9)):
        seen, *_ = env.step(action.astype(np.float32))
        observed = theirs.step(action.astype(np.float32))[0]["observation"]
        np.testing.assert_array_equal(np.concatenate([*seen.values()]), observed)


def test_a_seed_decides_the_episode_bitwise_in_a_fresh_and_a_used_environment(env):
    fresh = FmKitchenEnv().make()
    for seed in (0, 1):
        first = episode(fresh, seed)
        other = episode(env, seed + 10, steps=9)
        assert same(first, episode(env, seed))
        assert not np.array_equal(first[0], other[0])
    assert same(first, episode(fresh, 1))


def test_a_seed_decides_the_episode_bitwise_in_a_batch(env):
    """One of sixteen, or alone."""
    batch = make_env(FmKitchenEnv(), n_envs=16)["fm_kitchen"][0]
    seeds = list(range(100, 116))
    seen, _ = batch.reset(seed=seeds)
    trace = [[{name: values[row].copy() for name, values in seen.items()} for row in range(16)]]
    together = np.stack([actions(seed, 2) for seed in seeds], axis=1)
    for step in together:
        seen, *_ = batch.step(step)
        trace.append([{name: values[row].copy() for name, values in seen.items()} for row in range(16)])
    for row in (0, 7, 15):
        alone = [value for value in episode(env, seeds[row], steps=2) if value.ndim]
        assert same(alone, [value for step in trace for value in step[row].values()])


def test_several_processes_give_what_one_gives(env):
    batch = make_env(FmKitchenEnv(), n_envs=2, use_async_envs=True)["fm_kitchen"][0]
    assert isinstance(batch, gym.vector.AsyncVectorEnv)
    try:
        seen, info = batch.reset(seed=[4, 5])
        assert not info["is_success"].any()
        told = batch.call("task_description")
        after, rewards, *_ = batch.step(np.stack([actions(seed, 1)[0] for seed in (4, 5)]))
    finally:
        batch.close()
    for row, seed in enumerate((4, 5)):
        alone = episode(env, seed, steps=1)
        there = [*(values[row] for values in seen.values()), *(values[row] for values in after.values()), rewards[row]]
        assert same(alone, there)
    assert told[0] == env.get_wrapper_attr("task_description")


def test_without_a_seed_the_noise_goes_on(env):
    env.reset(seed=7)
    drawn = [env.reset()[0]["agent_pos"] for _ in range(2)]
    env.reset(seed=7)
    again = [env.reset()[0]["agent_pos"] for _ in range(2)]
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(*drawn)


def test_noise_can_be_left_out_or_raised():
    calm = FmKitchenEnv(robot_noise_ratio=0, object_noise_ratio=0).make()
    first, second = (calm.reset(seed=seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(first["agent_pos"], calm.unwrapped.data.qpos[:9])
    assert all(np.array_equal(first[name], second[name]) for name in first)
    noisy = Kitchen(robot_noise_ratio=0.1)
    far = np.array([noisy.reset(seed=seed)[0]["agent_pos"] - first["agent_pos"] for seed in range(40)])
    assert 0.009 < np.abs(far).max() <= 0.01


def finish(env: gym.Env, *names: str) -> None:
    """Puts the things of some tasks where they should be."""
    simulator = env.unwrapped
    for name in names:
        index, goal = TASKS[name]
        simulator.data.qpos[index] = goal


def hold(env: gym.Env) -> tuple[float, bool, dict]:
    """A step that keeps the robot where it is."""
    _, reward, terminated, _, info = env.step(env.unwrapped.data.qpos[:9])
    return reward, terminated, info


def test_tasks_are_counted_scored_and_named(env):
    _, info = env.reset(seed=0)
    assert {name: value for name, value in info.items() if value} == {}
    assert type(info["is_success"]) is bool
    assert all(type(value) is float for name, value in info.items() if name != "is_success")
    order = ["microwave", "slide_cabinet", "light_switch", "hinge_cabinet", "kettle", "bottom_burner", "top_burner"]
    for count, name in enumerate(order, start=1):
        finish(env, name)
        reward, terminated, info = hold(env)
        assert reward == min(count / 4, 1)
        assert info["tasks_completed"] == count
        assert info["is_success"] is (count >= 4)
        assert [info[f"p{k}"] for k in range(1, 8)] == [float(k <= count) for k in range(1, 8)]
        assert {task for task in TASKS if info[f"done_{task}"] == 1} == set(order[:count])
        assert terminated is (count == 7)


def test_a_task_stays_done_and_a_new_episode_starts_with_none(env):
    env.reset(seed=0)
    finish(env, "microwave")
    hold(env)
    env.unwrapped.data.qpos[22] = 0
    reward, _, info = hold(env)
    assert (reward, info["done_microwave"]) == (0.25, 1)
    _, info = env.reset(seed=0)
    assert not any(info.values())
    assert hold(env)[0] == 0


def test_done_is_the_simulators_done(theirs):
    """At distances around the threshold."""
    theirs.reset(seed=0)
    rng = np.random.default_rng(0)
    start = theirs.data.qpos.copy()
    met = np.zeros(7, dtype=int)
    for _ in range(200):
        positions = start.copy()
        for index, goal in TASKS.values():
            away = rng.normal(size=len(index))
            positions[index] = goal + away / np.linalg.norm(away) * rng.uniform(0.2, 0.4)
        achieved = {name: positions[index] for name, index in franka_kitchen.OBS_ELEMENT_INDICES.items()}
        theirs.tasks_to_complete = set(theirs.goal)
        theirs.compute_reward(achieved, theirs.goal, {})
        ours = done_now(positions)
        met += ours
        assert {name for name, there in zip(TASKS, ours, strict=True) if there} == {
            name.replace(" ", "_") for name in theirs.step_task_completions
        }
    assert (met > 50).all()
    assert (met < 150).all()


def test_four_tasks_are_the_full_score():
    np.testing.assert_array_equal(score(np.arange(8.0)), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert SCORED == 4


def test_an_episode_ends_after_its_steps():
    env = FmKitchenEnv(episode_length=2).make()
    env.reset(seed=0)
    ends = [env.step(actions(0, 1)[0])[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_observations_become_the_features_of_the_policy(layout):
    config = FmKitchenEnv(layout=layout)
    env = make_env(config, n_envs=1)["fm_kitchen"][0]
    seen, _ = env.reset(seed=[1])
    got = {name: tuple(value.shape[1:]) for name, value in preprocess_observation(seen).items()}
    asked = {name: tuple(feature.shape) for name, feature in env_to_policy_features(config).items()}
    assert asked.pop("action") == env.single_action_space.shape == (9,)
    assert got == asked
    assert all(env.single_observation_space[name].shape == value.shape[1:] for name, value in seen.items())


def test_what_lerobot_asks_of_an_environment_is_there():
    env = make_env(FmKitchenEnv(episode_length=42), n_envs=1)["fm_kitchen"][0]
    assert env.call("_max_episode_steps") == (42,)
    assert env.call("task") == ("FrankaKitchen-v1",)
    assert all(isinstance(words, str) and words for words in env.call("task_description"))
    assert env.unwrapped.metadata["render_fps"] == 12 == FmKitchenEnv().fps


@pytest.mark.parametrize("action", [[np.nan] * 9, [np.inf] * 9, [1], [0] * 10])
def test_impossible_actions_are_refused(action, env):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="nine finite numbers"):
        env.step(np.array(action))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layout", "minari"),
        ("actions", "torque"),
        ("task", "FrankaKitchen-v0"),
        ("fps", 30),
        ("episode_length", 0),
        ("render_size", -1),
        ("robot_noise_ratio", -0.1),
        ("object_noise_ratio", float("nan")),
    ],
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} must be") as refusal:
        FmKitchenEnv(**{option: value})
    assert str(value) in str(refusal.value)


def test_the_preset_is_the_benchmark():
    config = make_env_config("kitchen")
    assert config == FmKitchenEnv()
    assert (config.layout, config.actions, config.episode_length) == ("relay", "joint_targets", 280)


@dataclass
class Run:
    """What a program of LeRobot reads."""

    env: EnvConfig


def test_the_command_line_reads_the_options():
    options = {"type": "fm_kitchen", "layout": "d4rl", "actions": "velocity", "robot_noise_ratio": "0.1"}
    config = draccus.parse(Run, args=[f"--env.{name}={value}" for name, value in options.items()]).env
    assert config == make_env_config("kitchen", layout="d4rl", actions="velocity", robot_noise_ratio=0.1)
    assert draccus.decode(Run, draccus.encode(Run(config))).env == config


def test_a_missing_simulator_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.envs.franka_kitchen", None)
    with pytest.raises(ModuleNotFoundError, match=r"gymnasium_robotics.*uv sync --extra kitchen.*pip install"):
        FmKitchenEnv().make()


def test_a_batch_needs_an_environment():
    with pytest.raises(ValueError, match="n_envs must be positive, not 0"):
        FmKitchenEnv().create_envs(0)


def test_pictures_are_drawn_where_there_is_opengl(monkeypatch):
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL on this machine")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = Kitchen(render_size=64)
    env.reset(seed=0)
    picture = env.render()
    env.close()
    assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
    assert picture.std() > 10


def test_pictures_are_refused_where_there_is_no_opengl(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    env = Kitchen()
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL=glfw .*egl or osmesa.* doctor kitchen"):
        env.render()


def test_a_choice_of_opengl_that_keeps_mujoco_from_loading_is_named(monkeypatch):
    def refuse(name):
        raise RuntimeError("invalid value for environment variable MUJOCO_GL: metal")

    broken = ModuleType("gymnasium_robotics.envs.franka_kitchen")
    broken.__getattr__ = refuse
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    monkeypatch.setenv("MUJOCO_GL", "metal")
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL=metal .*or unset it"):
        FmKitchenEnv().make()
