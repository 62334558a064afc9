"""LeRobot's own evaluation counts Push-T episodes exactly, in one process and in several."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from lerobot.envs.factory import make_env
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.scripts.lerobot_eval import eval_policy, rollout

from env_configs.pusht import FmPushtEnv

pytest.importorskip("gym_pusht", reason="needs the extra pusht")

STEPS = 160


class Scripted(PreTrainedPolicy):
    """Plays a table of actions (B, T, 2), the same in every batch of episodes."""

    config_class = ACTConfig
    name = "scripted"

    def __init__(self, actions: np.ndarray):
        super().__init__(ACTConfig(device="cpu"))
        self.actions = torch.from_numpy(actions)
        self.reset()

    def reset(self):
        self.step = -1

    def select_action(self, batch, **kwargs):
        self.step += 1
        return self.actions[:, self.step]

    def predict_action_chunk(self, batch, **kwargs):
        raise NotImplementedError

    def forward(self, batch):
        raise NotImplementedError

    def get_optim_params(self):
        return self.parameters()


class Start(gym.Wrapper):
    """Starts each seed at a state of a table."""

    def __init__(self, env: gym.Env, table: dict[int, list[float]]):
        super().__init__(env)
        self.table = table

    def reset(self, *, seed=None, options=None):
        state = {"reset_to_state": self.table[seed]} if seed is not None else {}
        return self.env.reset(seed=seed, options=(options or {}) | state)


@dataclass
class Tabled(FmPushtEnv):
    """Push-T whose seeds start where a table says."""

    table: dict | None = None
    type = "fm_pusht"

    def make(self) -> gym.Env:
        return Start(super().make(), self.table)


@pytest.fixture(scope="module")
def demonstrations(recording):
    """Starts and actions of four recordings: two that end early as successes, two that never succeed."""
    ends = recording["meta/episode_ends"]
    begins = np.append(0, ends[:-1])
    solved, failed = [], []
    for begin, end in zip(begins, ends, strict=True):
        state, action = recording["data/state"][begin], recording["data/action"][begin:end].astype(float)
        rewards, success = play(requested(state), action[:STEPS])
        (solved if success else failed).append((requested(state), action[:STEPS], rewards, success))
        if len(solved) >= 2 and len(failed) >= 2:
            return [solved[0], failed[0], solved[1], failed[1]]
    pytest.fail("no two successes among the demonstrations")


def requested(state: np.ndarray) -> list[float]:
    """What was asked of the reset that led to a recorded state (legacy convention)."""
    x, y, angle = state[2:].astype(float)
    place = np.array([x, y]) - [45 * np.sin(angle), 45 * (1 - np.cos(angle))]
    return [*state[:2].astype(float), *place, angle]


def play(start: list[float], actions: np.ndarray) -> tuple[list[float], bool]:
    """Rewards of one episode alone, then the verdict; the last action is held to the end."""
    env = FmPushtEnv(episode_length=STEPS).make()
    env.reset(options={"reset_to_state": start})
    rewards = []
    for step in range(STEPS):
        _, reward, terminated, _, info = env.step(actions[min(step, len(actions) - 1)])
        rewards.append(reward)
        if terminated:
            break
    return rewards, info["is_success"]


def test_sums_maxima_and_successes_are_exact(demonstrations):
    held = [np.concatenate([a, np.repeat(a[-1:], STEPS - len(a), 0)]) for _, a, _, _ in demonstrations]
    table = {10 + i: start for i, (start, _, _, _) in enumerate(demonstrations)}
    env = make_env(Tabled(episode_length=STEPS, table=table), n_envs=4)["fm_pusht"][0]
    told = evaluate(env, Scripted(np.array(held)), episodes=4, seed=10)
    lengths = [len(rewards) for _, _, rewards, _ in demonstrations]
    assert len(set(lengths)) == 3
    assert max(lengths) == STEPS
    for got, (_, _, rewards, success) in zip(told["per_episode"], demonstrations, strict=True):
        assert got["sum_reward"] == pytest.approx(sum(rewards), abs=1e-12)
        assert got["max_reward"] == max(rewards)
        assert got["success"] is success
    assert told["aggregated"]["pc_success"] == 50


def evaluate(env: gym.vector.VectorEnv, policy: Scripted, episodes: int, seed: int) -> dict:
    """LeRobot's evaluation with processors that change nothing."""
    same = (lambda value: value,) * 4
    return eval_policy(env, policy, *same, n_episodes=episodes, start_seed=seed)


def test_an_episode_that_runs_out_of_time_is_no_success():
    env = make_env(FmPushtEnv(episode_length=5), n_envs=2)["fm_pusht"][0]
    told = evaluate(env, Scripted(np.full((2, 5, 2), 256.0)), episodes=4, seed=0)
    assert [row["success"] for row in told["per_episode"]] == [False] * 4
    assert [row["seed"] for row in told["per_episode"]] == [0, 1, 2, 3]


def test_an_ended_episode_stays_as_it_was_until_the_next_rollout():
    env = make_env(FmPushtEnv(episode_length=2), n_envs=1)["fm_pusht"][0]
    env.reset(seed=[0])
    actions = np.full((1, 2), 256.0)
    env.step(actions)
    last, _, _, truncated, _ = env.step(actions)
    assert truncated[0]
    for _ in range(3):
        seen, reward, *_, info = env.step(actions)
        assert reward[0] == 0
        assert not info["is_success"][0]
        assert all(np.array_equal(seen[name], last[name]) for name in last)
    started, info = env.reset(seed=[0], options={NEW_ROLLOUT_OPTION: True})
    assert "initial_state" in info
    assert not np.array_equal(started["agent_pos"], last["agent_pos"])


def test_several_processes_give_what_one_gives():
    actions = np.random.default_rng(0).uniform(50, 450, (2, 25, 2))
    traces = []
    for asynchronous in (False, True):
        config = FmPushtEnv(episode_length=25, block_range=(200, 300), starts="random_state")
        env = make_env(config, n_envs=2, use_async_envs=asynchronous)["fm_pusht"][0]
        assert isinstance(env, gym.vector.AsyncVectorEnv) is asynchronous
        traces.append(roll(env, Scripted(actions)))
        env.close()
    together, apart = traces
    assert all(torch.equal(together[name], apart[name]) for name in ("reward", "success", "done"))
    assert together["observation"].keys() == apart["observation"].keys()
    for name, values in together["observation"].items():
        assert torch.equal(values, apart["observation"][name])
        assert values.shape[1] == 26


def roll(env: gym.vector.VectorEnv, policy: Scripted) -> dict:
    """One batch of LeRobot's rollout, observations included."""
    same = (lambda value: value,) * 4
    found = rollout(env, policy, *same, seeds=[100_000, 100_001], return_observations=True)
    found["observation"].pop("task", None)
    return found
