import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end

from fm_policy.evaluation.checkpoint import Checkpoint
from fm_policy.evaluation.episodes import Episode, plan
from fm_policy.evaluation.inference import ChunkSampler
from fm_policy.evaluation.rollouts import evaluate, jitter, run_episodes
from fm_policy.evaluation.videos import Camera

SEEDS = range(1000, 1006)


def run(checkpoint: Checkpoint, env_config: EnvConfig, seeds: Any = SEEDS, repeats: int = 2, **options: Any):
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    return evaluate(*parts, env_config, seeds, repeats, **options)


@pytest.fixture(scope="module")
def rows(checkpoint: Checkpoint, short_pusht: EnvConfig) -> list[Episode]:
    return run(checkpoint, short_pusht)


# ---------------------------------------------------------------- an episode depends on its seed and repeat alone


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rows_do_not_depend_on_the_batch_size(checkpoint, short_pusht, rows, batch_size):
    assert run(checkpoint, short_pusht, batch_size=batch_size) == rows


def test_rows_do_not_depend_on_workers(checkpoint, short_pusht, rows):
    assert run(checkpoint, short_pusht, batch_size=2, use_async_envs=True) == rows


def test_rows_do_not_depend_on_the_order_or_on_what_runs_beside_them(checkpoint, short_pusht, rows):
    some = run(checkpoint, short_pusht, seeds=[SEEDS[4], SEEDS[1]], repeats=1)
    assert some == [rows[4], rows[1]]


def test_rows_do_not_depend_on_films(checkpoint, short_pusht, rows, tmp_path):
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    jobs = plan(SEEDS, 2)
    camera = Camera(tmp_path / "videos", jobs[1:3])
    filmed = list(run_episodes(ChunkSampler(*parts, short_pusht), short_pusht, jobs, 5, camera=camera))
    assert sorted(filmed, key=lambda episode: episode.key[::-1]) == rows
    assert [path.name for path in sorted(tmp_path.glob("videos/*"))] == ["episode_1001_0.mp4", "episode_1002_0.mp4"]
    with av.open(tmp_path / "videos/episode_1002_0.mp4") as film:
        assert sum(1 for _ in film.decode(video=0)) == 31  # the start and every step


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n_obs_steps": 2, "horizon": 8, "n_action_steps": 3}, id="history"),
        pytest.param({"velocity_net": "transformer", "transformer_dim": 32, "transformer_layers": 2}, id="transformer"),
    ],
)
def test_rows_of_other_policies_do_not_depend_on_the_batch_size(make_checkpoint, short_pusht, fields):
    other, env_config = make_checkpoint(**fields), replace(short_pusht, episode_length=10)
    assert run(other, env_config, repeats=1, batch_size=4) == run(other, env_config, repeats=1)


def test_rows_of_an_adaptive_solver_do_not_depend_on_the_batch_size(make_checkpoint, short_pusht):
    other, env_config = (
        make_checkpoint(solver="dopri5", horizon=4, n_action_steps=4),
        replace(short_pusht, episode_length=4),
    )
    whole = run(other, env_config, SEEDS[:2], repeats=1, observation_noise=0.1)
    assert run(other, env_config, SEEDS[:2], repeats=1, batch_size=1, observation_noise=0.1) == whole
    assert whole[0].nfe != whole[1].nfe


def test_rows_of_a_policy_that_sees_images_do_not_depend_on_the_batch_size(make_checkpoint, short_pusht):
    other = make_checkpoint(sees="observation.image", use_ema=False, num_solver_steps=1)
    env_config = replace(short_pusht, obs="image", episode_length=16)
    whole = run(other, env_config, SEEDS[:3], repeats=1)
    assert run(other, env_config, SEEDS[:3], repeats=1, batch_size=2) == whole


def test_repeats_share_the_start_but_not_the_noise(rows):
    first, second = rows[: len(SEEDS)], rows[len(SEEDS) :]
    assert [episode.initial_state for episode in first] == [episode.initial_state for episode in second]
    assert [episode.max_reward for episode in first] != [episode.max_reward for episode in second]
    assert [episode.key for episode in rows] == plan(SEEDS, 2)


def test_start_is_the_one_of_the_seed(rows):
    draw = np.random.RandomState(1003)
    expected = [*draw.randint(50, 450, 2), *draw.randint(100, 400, 2), draw.randn() * 2 * np.pi - np.pi]
    assert rows[3].initial_state == pytest.approx(expected)


# ---------------------------------------------------------------- noise in the observations


def test_noise_in_observations_does_not_depend_on_the_batch_size_and_is_that_of_the_seed(checkpoint, short_pusht, rows):
    noisy = run(checkpoint, short_pusht, batch_size=16, observation_noise=0.1)
    assert run(checkpoint, short_pusht, batch_size=1, observation_noise=0.1) == noisy
    assert run(checkpoint, short_pusht, [SEEDS[4]], 1, observation_noise=0.1) == [noisy[4]]
    for with_noise, without in zip(noisy, rows, strict=True):
        assert with_noise.key == without.key and with_noise.initial_state == without.initial_state
        assert with_noise.measures != without.measures


def test_no_noise_in_observations_is_no_option(checkpoint, short_pusht, rows):
    assert run(checkpoint, short_pusht, observation_noise=0.0) == rows


def test_noise_in_observations_has_its_size_in_normalised_units_and_leaves_the_policys_own_noise(
    make_checkpoint, short_pusht, monkeypatch
):
    """The first chunks of 32 episodes: what the policy is asked, with noise and without."""
    other, asked = make_checkpoint(n_obs_steps=2, horizon=8, n_action_steps=4), []
    answer = other.policy.predict_action_chunk

    def record(batch, noise):
        features = [batch[name] for name in other.policy.config.input_features]
        asked.append((torch.cat(features, dim=-1).clone(), noise.clone()))
        return answer(batch, noise)

    monkeypatch.setattr(other.policy, "predict_action_chunk", record)
    for sigma in (0.0, 0.1, 0.2):
        run(other, replace(short_pusht, episode_length=4), range(32), 1, observation_noise=sigma)
    (clean, x0), (small, x0_small), (large, x0_large) = asked
    assert torch.equal(x0, x0_small) and torch.equal(x0, x0_large)
    drawn = (small - clean).double() / 0.1
    assert drawn.shape == (32, 2, 18)
    assert drawn.mean() == pytest.approx(0, abs=5 / math.sqrt(drawn.numel()))
    assert drawn.std() == pytest.approx(1, abs=5 / math.sqrt(2 * drawn.numel()))
    assert (large - clean) / 0.2 == pytest.approx(drawn, abs=1e-5)  # the same draw, twice as large


def test_noise_in_images_is_refused(make_checkpoint, short_pusht):
    other = make_checkpoint(sees="observation.image", use_ema=False)
    with pytest.raises(ValueError, match=r"only observations of numbers.*\['observation\.image'\]"):
        run(other, replace(short_pusht, obs="image"), observation_noise=0.1)


# ---------------------------------------------------------------- counting, in a task with known numbers


class Countdown(gym.Env):
    """Ends after 3 + seed steps; step n is worth -|n - 4|, and is a success if n = 4."""

    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Dict(
        {"agent_pos": gym.spaces.Box(0, 512, (2,)), "environment_state": gym.spaces.Box(0, 512, (16,))}
    )
    action_space = gym.spaces.Box(0, 512, (2,), np.float32)
    task = task_description = "count"
    executed: ClassVar[list[list[np.ndarray]]] = []  # actions of every episode of this process

    def __init__(self, info_key: str = "is_success") -> None:
        self._info_key = info_key

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        assert seed is not None, "an ended episode must not start again by itself"
        self._last, self._step = 3 + seed, 0
        self.executed.append([])
        return self._observe(), {self._info_key: False, "height": 0.0, "width": 3, "initial_state": np.array([seed])}

    def step(self, action: np.ndarray):
        self._step += 1
        assert self._step <= self._last, "an ended episode must not go on"
        self.executed[-1].append(action.copy())
        info = {self._info_key: self._step == 4, "height": 2.0 * self._step, "width": 3}
        return self._observe(), -float(abs(self._step - 4)), self._step == self._last, False, info

    def _observe(self) -> dict[str, np.ndarray]:
        return {name: np.zeros(space.shape, np.float32) for name, space in self.observation_space.items()}


@dataclass
class CountdownConfig(EnvConfig):
    info_key: str = "is_success"
    autoreset: AutoresetMode = AutoresetMode.NEXT_STEP
    suites: tuple[str, ...] = ("count",)
    limit: int = 100
    built: list[SyncVectorEnv] = field(default_factory=list)

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False):
        def make() -> gym.Env:
            return gym.wrappers.TimeLimit(Countdown(self.info_key), self.limit)

        makers = [freeze_after_episode_end(make)] * n_envs
        self.built += [SyncVectorEnv(makers, autoreset_mode=self.autoreset) for _ in self.suites]
        return {name: {0: env} for name, env in zip(self.suites, self.built, strict=True)}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_counts_are_exact(checkpoint, batch_size):
    episodes = run(checkpoint, CountdownConfig(), range(10), 1, n_action_steps=4, batch_size=batch_size)
    for seed, episode in enumerate(episodes):
        steps = 3 + seed
        assert episode == Episode(
            seed=seed,
            repeat=0,
            initial_state=[seed],
            max_reward=-1.0 if seed == 0 else 0.0,
            final_reward=-float(abs(steps - 4)),
            measures={"height": 2.0 * steps, "final_height": 2.0 * steps, "jitter": episode.measures["jitter"]},
            success=seed > 0,
            steps=steps,
            nfe=2,
            chunks=-(-steps // 4),
        )


def test_jitter_is_that_of_the_actions_that_were_executed(checkpoint, monkeypatch):
    """Chunks of 4 actions, and episodes that end amid a chunk: what was planned but not executed does not count."""
    monkeypatch.setattr(Countdown, "executed", [])
    episodes = run(checkpoint, CountdownConfig(), range(3), 2, n_action_steps=4, batch_size=1)
    assert [len(actions) for actions in Countdown.executed] == [3, 4, 5, 3, 4, 5]
    for episode, actions in zip(episodes, Countdown.executed, strict=True):
        bends = [a.astype(float) - 2 * b + c for a, b, c in zip(actions, actions[1:], actions[2:], strict=False)]
        assert episode.measures["jitter"] == pytest.approx(np.mean([bend @ bend / 2 for bend in bends]), rel=1e-6)
        assert episode.measures["jitter"] > 0


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        pytest.param([[3.0 * t, -t] for t in range(9)], 0.0, id="constant-velocity"),
        pytest.param([[t * t] for t in range(9)], 4.0, id="constant-acceleration"),  # t² has the second difference 2
        pytest.param([[(-1.0) ** t, 0.0] for t in range(9)], 8.0, id="shaking"),  # 4² in one dimension of two
        pytest.param([[0.0]] * 6 + [[5.0]] * 6, 2 * 5.0**2 / 10, id="step"),
        pytest.param([[1.0], [7.0]], 0.0, id="too-short"),
    ],
)
def test_jitter_of_known_actions(actions, expected):
    assert jitter(np.array(actions, dtype=np.float32)) == pytest.approx(expected)


def test_time_limit_of_the_task_ends_episodes(checkpoint):
    episodes = run(checkpoint, CountdownConfig(limit=5), [0, 50], 1)
    assert [episode.steps for episode in episodes] == [3, 5]


def test_ended_episodes_cost_no_inference(checkpoint):
    """Episodes of 3 to 42 steps, 4 to a chunk: calls are as large as the chunks that are still needed, no more."""
    config = CountdownConfig()
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    sampler = ChunkSampler(*parts, config, n_action_steps=4)
    episodes = list(run_episodes(sampler, config, plan(range(40), 1)))
    needed = [sum(episode.chunks > n for episode in episodes) for n in range(max(e.chunks for e in episodes))]
    assert [rows for rows, _ in sampler.calls] == [-(-rows // 16) * 16 for rows in needed]


def test_environments_are_built_once_and_closed(checkpoint):
    config = CountdownConfig()
    run(checkpoint, config, range(10), 2, batch_size=4)
    assert [env.num_envs for env in config.built] == [4]
    assert config.built[0].closed


def test_policy_comes_back_in_the_mode_in_which_it_came(checkpoint):
    checkpoint.policy.train()
    run(checkpoint, CountdownConfig(), [1], 1)
    assert checkpoint.policy.training
    checkpoint.policy.eval()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CountdownConfig(info_key="solved"), "lacks 'is_success'"),
        (CountdownConfig(autoreset=AutoresetMode.SAME_STEP), "NEXT_STEP"),
        (CountdownConfig(suites=("one", "two")), "holds 2 tasks"),
    ],
)
def test_tasks_that_cannot_be_counted_are_refused(checkpoint, config, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, config, [1], 1)
    assert all(env.closed for env in config.built)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_action_steps": 0}, "n_action_steps must be from 1 to 16.* got 0"),
        ({"n_action_steps": 17}, "n_action_steps must be from 1 to 16.* got 17"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"observation_noise": -0.1}, "observation_noise must be finite and at least 0, got -0.1"),
        ({"seeds": []}, "seeds must be one or more"),
    ],
)
def test_bad_values_are_refused_by_name(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, CountdownConfig(), **options)


def test_nothing_to_do_builds_nothing(checkpoint):
    config = CountdownConfig()
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    assert list(run_episodes(ChunkSampler(*parts, config), config, [])) == []
    assert config.built == []
