"""The Push-T environment: its starts, its information, its refusals."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import draccus
import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import env_to_policy_features, preprocess_observation

from env_configs import PRESETS, make_env_config
from env_configs.pusht import FmPushtEnv, PushT

pytest.importorskip("gym_pusht", reason="needs the extra pusht")

FIXTURE = Path(__file__).parent / "fixtures" / "pusht_random_state_starts.json"


def episode(env: gym.Env, seed: int, steps: int = 30) -> list[np.ndarray]:
    """Every observation, reward and coverage of some scripted steps."""
    seen, info = env.reset(seed=seed)
    trace = [*seen.values(), info["initial_state"], info["coverage"]]
    for action in np.random.default_rng(seed).uniform(0, 512, (steps, 2)):
        seen, reward, _, _, info = env.step(action)
        trace += [*seen.values(), reward, info["coverage"]]
    return [np.asarray(value) for value in trace]


@pytest.mark.parametrize("seed", [0, 1, 1000, 100_000])
def test_default_starts_are_gym_pushts(seed):
    import gym_pusht  # noqa: F401  (registers its environments)

    ours, _ = FmPushtEnv().make().reset(seed=seed)
    theirs, _ = gym.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos").reset(seed=seed)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("starts", ["gymnasium", "random_state"])
def test_a_seed_decides_the_episode_bitwise(starts):
    fresh, used = FmPushtEnv(starts=starts).make(), FmPushtEnv(starts=starts).make()
    for seed in range(0, 40, 2):
        first = episode(fresh, seed)
        other = episode(used, seed + 1)
        assert all(np.array_equal(a, b) for a, b in zip(first, episode(used, seed), strict=True))
        assert not np.array_equal(first[0], other[0])


def test_rewards_and_coverage_are_gym_pushts():
    from gym_pusht.envs.pusht import PushTEnv

    env = FmPushtEnv(block_range=(200, 300)).make()
    simulator = env.unwrapped
    for seed in range(5):
        env.reset(seed=seed)
        for action in np.random.default_rng(seed).uniform(100, 400, (20, 2)):
            _, reward, terminated, _, info = env.step(action)
            theirs = PushTEnv._get_coverage(simulator)
            assert info["coverage"] == pytest.approx(theirs, abs=1e-9)
            assert reward == pytest.approx(min(theirs / 0.95, 1), abs=1e-9)
            assert terminated is info["is_success"] is bool(theirs > 0.95)


@pytest.mark.parametrize("starts", ["gymnasium", "random_state"])
def test_without_a_seed_the_starts_go_on_and_differ(starts):
    env, again = (FmPushtEnv(starts=starts).make() for _ in range(2))
    seeds = [7, None, None]
    drawn = np.array([env.reset(seed=seed)[1]["initial_state"] for seed in seeds])
    repeated = np.array([again.reset(seed=seed)[1]["initial_state"] for seed in seeds])
    np.testing.assert_array_equal(drawn, repeated)
    assert len(np.unique(drawn, axis=0)) == 3


@pytest.mark.parametrize("starts", ["gymnasium", "random_state"])
@pytest.mark.parametrize(("name", "low", "high"), [("pusht_a", 200, 300), ("pusht_b", 100, 400)])
def test_the_ranges_are_filled_and_kept(name, low, high, starts):
    env = PushT(**draw_options(make_env_config(name, starts=starts)))
    drawn = np.array([env.reset(seed=seed)[1]["initial_state"] for seed in range(300)])
    agent, block, angle = drawn[:, :2], drawn[:, 2:4], drawn[:, 4] % (2 * np.pi)
    assert agent.min() >= 50
    assert agent.max() < 450
    assert np.ptp(agent) > 380
    assert block.min() >= low
    assert block.max() < high
    assert np.ptp(block) > 0.95 * (high - low)
    assert np.array_equal(drawn[:, :4], np.round(drawn[:, :4]))
    assert (np.histogram(angle, 6, (0, 2 * np.pi))[0] > 20).all()


def draw_options(config: FmPushtEnv) -> dict:
    return {name: value for name, value in config.gym_kwargs.items() if name != "max_episode_steps"}


def test_random_state_starts_are_diffusion_policys():
    env = make_env_config("pusht", starts="random_state").make()
    for seed, state in json.loads(FIXTURE.read_text()).items():
        np.testing.assert_array_equal(env.reset(seed=int(seed))[1]["initial_state"], state)


def test_the_fixture_holds_the_published_test_seeds_by_the_published_formula():
    fixture = json.loads(FIXTURE.read_text())
    assert list(fixture) == [str(seed) for seed in range(100_000, 100_050)]
    for seed, state in fixture.items():
        rs = np.random.RandomState(int(seed))
        places = [rs.randint(50, 450), rs.randint(50, 450), rs.randint(100, 400), rs.randint(100, 400)]
        assert state == [*places, rs.randn() * 2 * np.pi - np.pi]


def test_an_initial_state_brings_its_episode_back():
    env = FmPushtEnv().make()
    seen, info = env.reset(seed=3)
    again, told = env.reset(options={"reset_to_state": info["initial_state"].tolist(), "other": 1})
    assert all(np.array_equal(seen[name], again[name]) for name in seen)
    np.testing.assert_array_equal(info["initial_state"], told["initial_state"])


def test_starts_follow_the_legacy_convention():
    """The block is placed, then turned about its centre of mass (0, 45): p becomes p + c - R(angle) c."""
    _, info = FmPushtEnv().make().reset(options={"reset_to_state": [100, 100, 250, 250, 2.0]})
    turned = np.array([[np.cos(2), -np.sin(2)], [np.sin(2), np.cos(2)]]) @ [0, 45]
    np.testing.assert_allclose(info["block_pose"], [*(250 + np.array([0, 45]) - turned), 2], atol=1e-9)


def test_every_info_says_success_and_coverage_as_plain_values():
    env = FmPushtEnv(episode_length=3).make()
    _, info = env.reset(seed=0)
    steps = [env.step(np.array([256, 256], np.float32)) for _ in range(3)]
    for told in (info, *(step[4] for step in steps)):
        assert type(told["is_success"]) is bool
        assert type(told["coverage"]) is float
    assert [step[3] for step in steps] == [False, False, True]
    assert not any(step[2] for step in steps)


def test_a_block_pushed_home_ends_the_episode_as_a_success():
    env = FmPushtEnv().make()
    env.reset(seed=0)
    simulator = env.unwrapped
    simulator.block.angle = np.pi / 4
    simulator.block.position = (256, 256)
    _, reward, terminated, truncated, info = env.step(np.array([20, 20], np.float32))
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, True, False, True)
    assert info["coverage"] > 0.99


def test_states_are_never_drawn(monkeypatch):
    from gym_pusht.envs.pusht import PushTEnv

    def refuse(_):
        raise AssertionError("the board was drawn")

    monkeypatch.setattr(PushTEnv, "_draw", refuse)
    env = FmPushtEnv().make()
    episode(env, 0, steps=3)
    with pytest.raises(AssertionError, match="drawn"):
        env.render()


def test_pictures_are_what_the_features_say():
    config = FmPushtEnv(obs="image", render_size=128)
    env = config.make()
    seen, _ = env.reset(seed=0)
    assert seen["pixels"].shape == config.features["pixels"].shape == (96, 96, 3)
    assert seen["pixels"].dtype == np.uint8
    assert len(np.unique(seen["pixels"])) > 10
    assert env.render().shape == (128, 128, 3)


@pytest.mark.parametrize("obs", ["state", "image"])
def test_observations_become_the_features_of_the_policy(obs):
    config = FmPushtEnv(obs=obs)
    env = make_env(config, n_envs=2)["fm_pusht"][0]
    seen, _ = env.reset(seed=[1, 2])
    got = {name: tuple(value.shape[1:]) for name, value in preprocess_observation(seen).items()}
    asked = {name: tuple(feature.shape) for name, feature in env_to_policy_features(config).items()}
    assert asked.pop("action") == (2,)
    assert got == asked
    assert {"state": "observation.environment_state", "image": "observation.image"}[obs] in got


def test_what_lerobot_asks_of_an_environment_is_there():
    env = make_env(FmPushtEnv(episode_length=42), n_envs=2)["fm_pusht"][0]
    assert env.call("_max_episode_steps") == (42, 42)
    assert env.call("task") == ("PushT-v0",) * 2
    assert all(isinstance(words, str) and words for words in env.call("task_description"))
    assert env.unwrapped.metadata["render_fps"] == 10 == FmPushtEnv().fps


@pytest.mark.parametrize("action", [[np.nan, 1], [np.inf, 1], [1], [1, 2, 3]])
def test_impossible_actions_are_refused(action):
    env = FmPushtEnv().make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="two finite numbers"):
        env.step(np.array(action))


@pytest.mark.parametrize("state", [[1, 2, 3, 4], [1, 2, 3, 4, np.nan]])
def test_impossible_starts_are_refused(state):
    with pytest.raises(ValueError, match="reset_to_state must be finite agent x, y, block x, y, angle"):
        FmPushtEnv().make().reset(options={"reset_to_state": state})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("obs", "pixels"),
        ("starts", "random"),
        ("task", "PushT-v1"),
        ("fps", 30),
        ("episode_length", 0),
        ("render_size", -1),
        ("block_range", (300, 200)),
        ("block_range", (-1, 200)),
        ("agent_range", (50, 513)),
        ("agent_range", (50.5, 450)),
        ("agent_range", (50, 100, 450)),
    ],
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} must be") as refusal:
        FmPushtEnv(**{option: value})
    assert str(value) in str(refusal.value)


def test_presets_are_named_and_unknown_ones_refused():
    assert make_env_config("pusht") == make_env_config("pusht_b")
    assert make_env_config("pusht_a").block_range == (200, 300)
    assert make_env_config("pusht_a", obs="image", starts="random_state").obs == "image"
    with pytest.raises(ValueError, match=f"unknown task 'pushed'; known are {', '.join(PRESETS)}"):
        make_env_config("pushed")
    with pytest.raises(ValueError, match=r"'pusht' has no option blockrange; known are .*block_range"):
        make_env_config("pusht", blockrange=(1, 2))


@dataclass
class Run:
    """What a program of LeRobot reads."""

    env: EnvConfig


def test_the_command_line_reads_the_options():
    options = {"type": "fm_pusht", "block_range": "[200,300]", "obs": "image", "starts": "random_state"}
    config = draccus.parse(Run, args=[f"--env.{name}={value}" for name, value in options.items()]).env
    assert config == make_env_config("pusht_a", obs="image", starts="random_state")
    assert draccus.decode(Run, draccus.encode(Run(config))).env == config


def test_a_missing_simulator_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(ModuleNotFoundError, match=r"gym_pusht.*uv sync --extra pusht.*pip install"):
        FmPushtEnv().make()


def test_a_batch_needs_an_environment():
    with pytest.raises(ValueError, match="n_envs must be positive, not 0"):
        FmPushtEnv().create_envs(0)
