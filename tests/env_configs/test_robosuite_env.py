"""The environments of robosuite: their starts, their actions, their information, their refusals."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import draccus
import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import env_to_policy_features, preprocess_observation
from scipy.spatial.transform import Rotation

from env_configs import make_env_config
from env_configs.opengl import NoOpenGLError
from env_configs.robosuite_models import TASKS
from env_configs.robosuite_tasks import RobosuiteTask
from env_configs.rotations import from_six, to_rotation_vector, to_six

# Not by importing it: robosuite would set MUJOCO_GL for all tests.
pytestmark = pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra robosuite")

PROPRIO = ("eef_pos", "eef_quat", "gripper_qpos")
DOWN = Rotation.from_euler("x", np.pi).as_matrix()


@pytest.fixture(scope="module")
def make() -> Callable[[str, str], RobosuiteTask]:
    """Environments by task and actions, each built once."""
    built: dict[tuple[str, str], RobosuiteTask] = {}

    def get(name: str, actions: str = "delta") -> RobosuiteTask:
        if (name, actions) not in built:
            built[name, actions] = RobosuiteTask(name, actions)
        return built[name, actions]

    return get


def bare(name: str):
    """robosuite itself, with the settings of the benchmark."""
    import robosuite
    from robosuite.controllers import load_composite_controller_config

    controllers = load_composite_controller_config(controller="BASIC")
    arm = controllers["body_parts"]["right"] | {"input_ref_frame": "world", "input_type": "delta"}
    controllers["body_parts"] = {"right": arm}
    arms = {"robots": "Panda"} if name == "Lift" else {"robots": ["Panda"] * 2, "env_configuration": "opposed"}
    off = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False}
    return robosuite.make(name, controller_configs=controllers, control_freq=20, ignore_done=True, **arms, **off)


def episode(env: gym.Env, seed: int, steps: int = 3) -> list[np.ndarray]:
    """Every observation and measure of some random actions."""
    seen, info = env.reset(seed=seed)
    trace = [*seen.values(), *info.values()]
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)):
        seen, reward, _, _, info = env.step(action)
        trace += [*seen.values(), reward, *info.values()]
    return [np.asarray(value) for value in trace]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["lift", "transport"])
def test_starts_and_physics_are_robosuites(name, make):
    env, theirs = make(name), bare(TASKS[name].name)
    seen, info = env.reset(seed=5)
    np.random.seed(5)  # noqa: NPY002
    told = theirs.reset()
    np.testing.assert_array_equal(info["initial_state"], theirs.sim.get_state().flatten())
    np.testing.assert_array_equal(seen["environment_state"], told["object-state"])
    parts = [told[f"robot{arm}_{part}"] for arm in range(env._row.arms) for part in PROPRIO]
    np.testing.assert_array_equal(seen["agent_pos"], np.concatenate(parts))
    for action in np.random.default_rng(0).uniform(-1, 1, (3, *env.action_space.shape)):
        env.step(action)
        theirs.step(action)
        np.testing.assert_array_equal(env._simulator.state, theirs.sim.get_state().flatten())


def test_observations_are_of_the_present(make):
    """After a step they are what the simulator computes from the new state."""
    env = make("lift")
    env.reset(seed=0)
    seen = env.step(np.array([1, 0, -1, 0, 0, 0.5, 1]))[0]
    env._simulator._env.sim.forward()
    again, _ = env._simulator.observe()
    assert all(np.array_equal(seen[name], again[name]) for name in seen)


@pytest.mark.parametrize("name", ["lift", "handover"])
def test_a_seed_decides_the_episode_bitwise(name, make):
    """Also where the size of the object is drawn with the model; whatever ran before, and at whatever cost."""
    fresh, used = RobosuiteTask(name, "delta"), make(name)
    other = episode(used, 1)
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = episode(fresh, 0), episode(used, 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert same(first, second)
    assert not np.array_equal(first[0], other[0])
    fresh.close()


def test_the_size_of_the_cube_belongs_to_the_seed(make):
    env = make("lift")
    sizes = []
    for seed in (0, 1, 0):
        env.reset(seed=seed)
        model = env._simulator._env.sim.model
        sizes.append(model.geom_size[model.geom_name2id("cube_g0")].copy())
    np.testing.assert_array_equal(sizes[0], sizes[2])
    assert not np.array_equal(sizes[0], sizes[1])


def test_without_a_seed_the_starts_go_on_and_differ(make):
    env = make("lift")
    drawn = np.array([env.reset(seed=seed)[1]["initial_state"] for seed in (3, None, 3, None)])
    np.testing.assert_array_equal(drawn[:2], drawn[2:])
    assert not np.array_equal(drawn[0], drawn[1])


def test_an_initial_state_brings_its_episode_back(make):
    env = make("lift")
    first = episode(env, 4)
    state = env.reset(seed=4)[1]["initial_state"]
    seen, info = env.reset(seed=4, options={"reset_to_state": state.tolist(), "other": 1})
    assert same(first[: len(seen) + len(info)], [*seen.values(), *(np.asarray(value) for value in info.values())])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_batch_gives_what_one_gives(asynchronous, make):
    size = 2 if asynchronous else 4
    env = make_env(make_env_config("lift", actions="delta"), n_envs=size, use_async_envs=asynchronous)["fm_lift"][0]
    assert isinstance(env, gym.vector.AsyncVectorEnv) is asynchronous
    actions = np.random.default_rng(0).uniform(-1, 1, (2, size, 7))
    together = [env.reset(seed=list(range(size)))[0], *(env.step(action)[0] for action in actions)]
    env.close()
    alone = make("lift")
    for row in range(size):
        trace = [alone.reset(seed=row)[0], *(alone.step(action[row])[0] for action in actions)]
        for seen, single in zip(together, trace, strict=True):
            assert all(np.array_equal(seen[name][row], single[name]) for name in single)


def test_an_absolute_action_is_where_the_gripper_goes(make):
    """To its own place and turn it stays; 4 cm aside and a quarter turn about the vertical it is soon there."""
    env = make("lift", "absolute")
    env.reset(seed=0)
    place, turn = grip(env)
    for _ in range(3):
        env.step(np.concatenate([place, to_six(turn), [-1]]))
    np.testing.assert_allclose(grip(env)[0], place, atol=2e-3)
    goal = place + np.array([0.04, 0, 0]), Rotation.from_euler("z", np.pi / 4).as_matrix() @ turn
    for _ in range(25):
        env.step(np.concatenate([goal[0], to_six(goal[1]), [-1]]))
    np.testing.assert_allclose(grip(env)[0], goal[0], atol=5e-3)
    assert Rotation.from_matrix(grip(env)[1].T @ goal[1]).magnitude() < 0.05


def grip(env: RobosuiteTask) -> tuple[np.ndarray, np.ndarray]:
    """Place and turn of the first arm's grip site."""
    data = env._simulator._env.sim.data
    return data.get_site_xpos("gripper0_right_grip_site").copy(), data.get_site_xmat("gripper0_right_grip_site").copy()


def test_goals_of_delta_actions_do_as_absolute_actions_what_those_do(make):
    delta, absolute = make("handover", "delta"), make("handover", "absolute")
    delta.reset(seed=0)
    absolute.reset(seed=0)
    for action in np.random.default_rng(1).uniform(-1, 1, (4, 14)):
        goals = delta._simulator.goals(action)
        delta.step(action)
        absolute.step(np.hstack([goals, action.reshape(2, 7)[:, 6:]]).ravel())
    np.testing.assert_allclose(delta._simulator.state, absolute._simulator.state, atol=1e-6)


def test_a_lifted_cube_ends_the_episode_as_a_success(make):
    env = make("lift")
    state = env.reset(seed=0)[1]["initial_state"].copy()
    state[1 + 7 + 2 + 2] = 0.95
    _, info = env.reset(seed=0, options={"reset_to_state": state})
    assert info["is_success"] is True
    _, reward, terminated, truncated, info = env.step(np.zeros(7))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)


def test_parts_of_the_transport_are_told(make):
    """Lid aside, trash and hammer in their bins: one after the other, then all, which is a success."""
    env = make("transport")
    _, info = env.reset(seed=0)
    state = info["initial_state"].copy()
    poses = dict(zip(("payload", "trash", "start", "target", "waste", "lid"), state[19:61].reshape(6, 7), strict=True))
    assert [info[part] for part in PARTS] == [0.0, 0.0, 0.0]
    moves = {
        "lid_off": ("lid", poses["start"][:3] + np.array([0, 0.4, 0.3])),
        "trash_in_bin": ("trash", poses["waste"][:3] + (poses["trash"] - poses["target"])[:3] * UP - SUNK),
        "payload_in_bin": ("payload", poses["target"][:3] + (poses["payload"] - poses["start"])[:3] * UP - SUNK),
    }
    for count, part in enumerate(PARTS, start=1):
        body, place = moves[part]
        poses[body][:3] = place
        _, info = env.reset(seed=0, options={"reset_to_state": state})
        assert [info[other] for other in PARTS] == [1.0] * count + [0.0] * (3 - count)
        assert info["is_success"] is (count == 3)


UP, SUNK = np.array([0, 0, 1]), np.array([0, 0, 1e-3])
PARTS = ("lid_off", "trash_in_bin", "payload_in_bin")


@pytest.mark.parametrize("name", ["lift", "handover", "transport"])
def test_what_lerobot_asks_of_an_environment_is_there(name, make):
    config = make_env_config(name, episode_length=3, actions="delta")
    env = make(name)
    seen, info = env.reset(seed=0)
    got = {key: tuple(value.shape[1:]) for key, value in preprocess_observation(batched(seen)).items()}
    asked = {key: tuple(feature.shape) for key, feature in env_to_policy_features(config).items()}
    assert asked.pop("action") == env.action_space.shape == (7 * TASKS[name].arms,)
    assert make_env_config(name).features["action"].shape == (10 * TASKS[name].arms,)
    assert got == asked
    assert sum(shape[0] for shape in got.values()) == {"lift": 19, "handover": 34, "transport": 59}[name]
    assert all(space.shape == seen[key].shape for key, space in env.observation_space.items())
    assert type(info["is_success"]) is bool
    assert [type(info[part]) for part in info if part not in ("is_success", "initial_state")] == [float] * (
        1 if name == "lift" else 3
    )
    assert env.metadata["render_fps"] == config.fps == 20
    assert env.task == TASKS[name].name and env.task_description


def batched(seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value[None] for key, value in seen.items()}


def test_an_episode_ends_after_its_length_and_stays_as_it_was():
    env = make_env(make_env_config("lift", episode_length=2), n_envs=1)["fm_lift"][0]
    assert env.call("_max_episode_steps") == (2,)
    env.reset(seed=[0])
    action = np.concatenate([[0, 0, 1], to_six(DOWN), [-1]])[None]
    env.step(action)
    last, _, terminated, truncated, _ = env.step(action)
    assert (terminated[0], truncated[0]) == (False, True)
    seen, reward, *_ = env.step(action)
    assert reward[0] == 0
    assert all(np.array_equal(seen[name], last[name]) for name in last)
    env.close()


def test_nothing_is_drawn_unasked_and_a_picture_changes_nothing(make):
    """Where MuJoCo was not told of an OpenGL, the error says what to do."""
    env = make("lift")
    plain = episode(env, 2)
    start, told = env.reset(seed=2)
    assert env._simulator._renderer is None
    if not os.environ.get("MUJOCO_GL"):
        with pytest.raises(NoOpenGLError, match="set it to egl or osmesa"):
            env.render()
        return
    picture = env.render()
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture)) > 50
    action = np.random.default_rng(2).uniform(-1, 1, (3, 7))[0]
    seen = env.step(action)[0]
    first = len(start) + len(told)
    assert same(plain[first : first + len(seen)], list(seen.values()))


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_impossible_actions_are_refused(action, make):
    env = make("lift")
    with pytest.raises(ValueError, match="an action of Lift is 7 finite numbers, delta, not"):
        env.step(action)


def test_actions_that_mean_no_rotation_are_refused(make):
    env = make("lift", "absolute")
    with pytest.raises(ValueError, match="two vectors that are not zero or parallel"):
        env.step(np.zeros(10))


@pytest.mark.parametrize("state", [np.zeros(31), np.full(32, np.nan)])
def test_impossible_starts_are_refused(state, make):
    with pytest.raises(ValueError, match="reset_to_state must be 32 finite numbers for Lift"):
        make("lift").reset(seed=0, options={"reset_to_state": state})


def test_seeds_that_numpy_does_not_know_are_refused(make):
    with pytest.raises(ValueError, match=f"must be below 2..32, not {2**32}"):
        make("lift").reset(seed=2**32)


@pytest.mark.parametrize(
    ("option", "value"),
    [("task", "Stack"), ("fps", 10), ("actions", "joint"), ("episode_length", 0), ("render_size", 0)],
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} must be") as refusal:
        make_env_config("lift", **{option: value})
    assert str(value) in str(refusal.value)


@dataclass
class Run:
    """What a program of LeRobot reads."""

    env: EnvConfig


@pytest.mark.parametrize("name", ["lift", "handover", "transport"])
def test_the_command_line_reads_the_options(name):
    options = [f"--env.type=fm_{name}", "--env.actions=delta", "--env.episode_length=9"]
    config = draccus.parse(Run, args=options).env
    assert config == make_env_config(name, actions="delta", episode_length=9)
    assert make_env_config(name).episode_length == {"lift": 400, "handover": 700, "transport": 700}[name]


def test_a_missing_simulator_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ModuleNotFoundError, match=r"robosuite.*uv sync --extra robosuite.*pip install"):
        make_env_config("transport").make()


def test_six_numbers_are_the_first_two_columns_and_any_six_a_rotation():
    rng = np.random.default_rng(0)
    matrices = Rotation.random(50, rng).as_matrix()
    np.testing.assert_array_equal(to_six(matrices), np.hstack([matrices[:, :, 0], matrices[:, :, 1]]))
    np.testing.assert_allclose(from_six(to_six(matrices)), matrices, atol=1e-12)
    np.testing.assert_allclose(from_six(3 * to_six(matrices)), matrices, atol=1e-12)
    np.testing.assert_allclose(
        Rotation.from_rotvec(to_rotation_vector(to_six(matrices))).as_matrix(), matrices, atol=1e-12
    )
    found = from_six(rng.normal(size=(4, 50, 6)))
    np.testing.assert_allclose(found @ found.swapaxes(-1, -2), np.broadcast_to(np.eye(3), found.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(found), 1)
    for bad in ([0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 2, 3, 2, 4, 6]):
        with pytest.raises(ValueError, match="not zero or parallel"):
            from_six(bad)
