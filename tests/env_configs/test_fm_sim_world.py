"""The simulated robot's clock, with the real Push-T and times that are handed in."""

from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest

from env_configs import FmSimConfig
from env_configs.fm_sim.motors import make_env, motors_of, readings
from env_configs.fm_sim.world import World
from env_configs.pusht_geometry import CENTRE_OF_MASS, GOAL_POSE, place

MOTORS = motors_of("pusht")
STEP = MOTORS.step
START = 1000.0


class KeptWorld(World):
    """A world that keeps what it tells."""

    def __init__(self, env: gym.Env | None = None, **fields):
        self.ended = []
        super().__init__(env or make_env("pusht", False), MOTORS, FmSimConfig(**fields), self.ended.append)

    def answer(self, action, at: float, after: float = 0.01) -> np.ndarray:
        """Observes at a time and acts a little later; returns the readings."""
        numbers, _ = self.observe(at)
        self.act(at + after, np.asarray(action, dtype=np.float64))
        return numbers


def targets(seed: int, count: int) -> np.ndarray:
    """A walk over the board that meets the block, (count, 2)."""
    rng = np.random.default_rng(seed)
    return np.clip(256 + np.cumsum(rng.normal(0, 25, (count, 2)), axis=0), 0, 512)


def in_lockstep(seed: int, actions: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """What the task itself shows before and after each action, (count + 1, 18), and its rewards."""
    env = make_env("pusht", False)
    seen = [readings(*env.reset(seed=seed))]
    rewards = []
    for action in actions:
        observation, reward, _, _, info = env.step(action)
        seen.append(readings(observation, info))
        rewards.append(reward)
    return np.array(seen), rewards


@pytest.mark.parametrize("after", [0.0, 0.03, 0.0999])
def test_an_answer_within_a_step_acts_as_in_the_benchmark(after):
    actions = targets(0, 40)
    seen, rewards = in_lockstep(3, actions)
    world = KeptWorld(seed=3)
    shown = [world.answer(action, START + k * STEP + 1e-6, after) for k, action in enumerate(actions)]
    np.testing.assert_array_equal(shown, seen[:-1])
    world.advance(START + 40.5 * STEP)
    assert world.episode.score == max(rewards) > 0
    assert (world.episode.held, len(world.episode.actions)) == (0, 40)


def test_a_late_answer_is_held_against_the_step_after():
    first, second = np.array([100.0, 300.0]), np.array([400.0, 200.0])
    seen, _ = in_lockstep(0, np.array([first, first, second]))
    world = KeptWorld()
    world.answer(first, START)
    world.answer(second, START + STEP, after=1.3 * STEP)
    np.testing.assert_array_equal(world.observe(START + 3.1 * STEP)[0], seen[3])
    assert world.episode.fresh == [True, False, True]
    assert world.episode.held == 1


def test_the_world_stands_still_until_somebody_acts():
    world = KeptWorld()
    first, _ = world.observe(START)
    later, _ = world.observe(START + 60)
    np.testing.assert_array_equal(later, first)
    assert world.episode.actions == []


def test_the_last_action_is_held_when_nobody_acts():
    world = KeptWorld()
    world.answer([256.0, 256.0], START)
    world.advance(START + 20.5 * STEP)
    assert len(world.episode.actions) == 20
    assert world.episode.held == 19
    np.testing.assert_array_equal(np.unique(world.episode.actions, axis=0), [[256.0, 256.0]])


def test_a_delayed_observation_is_the_one_of_then():
    actions = targets(1, 10)
    seen, _ = in_lockstep(0, actions)
    world = KeptWorld(observation_delay_s=2.5 * STEP)
    shown = [world.answer(action, START + k * STEP + 1e-6) for k, action in enumerate(actions)]
    np.testing.assert_array_equal(shown[3:], seen[:7])


def test_a_delayed_action_works_later_and_the_clock_waits_for_the_first():
    actions = targets(1, 10)
    seen, _ = in_lockstep(0, actions)
    world = KeptWorld(action_delay_s=1.5 * STEP)
    for k, action in enumerate(actions):
        world.answer(action, START + k * STEP)
    np.testing.assert_array_equal(world.observe(START + 11.6 * STEP)[0], seen[10])


def test_lost_observations_repeat_the_one_before_and_are_the_same_for_a_seed():
    def lost() -> list[bool]:
        world = KeptWorld(drop_rate=0.3, seed=5)
        shown = [world.answer(action, START + k * STEP + 1e-6) for k, action in enumerate(targets(2, 200))]
        return [bool((a == b).all()) for a, b in pairwise(shown)]

    first = lost()
    assert first == lost()
    assert 0.2 < np.mean(first) < 0.4


def test_noise_is_on_the_readings_and_not_in_the_world():
    actions = targets(3, 100)
    seen, rewards = in_lockstep(7, actions)

    def errors(noise: float) -> np.ndarray:
        """What every reading is off by, `(steps, motors)`."""
        world = KeptWorld(noise=noise, seed=7)
        shown = [world.answer(action, START + k * STEP + 1e-6) for k, action in enumerate(actions)]
        world.advance(START + 100.5 * STEP)
        assert world.episode.score == max(rewards)
        return np.array(shown) - seen[:-1]

    np.testing.assert_array_equal(errors(0.0), 0)
    error = errors(2.0)
    np.testing.assert_allclose(errors(4.0), 2 * error, atol=1e-9)  # of the same draws
    assert abs(error.std() - 2.0) < 0.1
    # 100 draws of each motor, 18 motors: within five standard errors, and no motor's noise is another's, or its last.
    np.testing.assert_allclose(error.std(axis=0), 2.0, atol=5 * 2.0 / np.sqrt(2 * 100))
    np.testing.assert_allclose(error.mean(axis=0), 0.0, atol=5 * 2.0 / np.sqrt(100))
    among = np.corrcoef(error.T)[~np.eye(error.shape[1], dtype=bool)]
    after = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in error.T]
    np.testing.assert_array_less(np.abs([*among, *after]), 5 / np.sqrt(100))


def test_an_episode_ends_in_time_and_the_next_one_waits_at_its_own_start():
    world = KeptWorld(seed=11, episode_s=1.0, pause_s=2.0)
    for k in range(10):
        world.answer([100.0, 100.0], START + k * STEP)
    first, _ = world.observe(START + 10.2 * STEP)
    assert [(e.number, e.seed, e.ended, len(e.actions)) for e in world.ended] == [(0, 11, "time", 10)]
    np.testing.assert_array_equal(first, in_lockstep(12, np.empty((0, 2)))[0][0])
    world.answer([400.0, 400.0], START + 2.0)
    np.testing.assert_array_equal(world.observe(START + 2.9)[0], first)
    world.answer([400.0, 400.0], START + 3.1)
    assert (world.observe(START + 3.6)[0] != first).any()


class _Solved(gym.Wrapper):
    """Push-T with the block where it belongs."""

    def reset(self, *, seed=None, options=None):
        x, y, angle = GOAL_POSE
        turned = place(CENTRE_OF_MASS[None], np.array([[0.0, 0.0, angle]]))[0, 0]
        start = np.array([x, y]) - CENTRE_OF_MASS + turned
        return self.env.reset(seed=seed, options={"reset_to_state": [50.0, 50.0, *start, angle]})


@pytest.mark.parametrize(("end_on_success", "steps", "why"), [(True, 1, "success"), (False, 10, "time")])
def test_a_success_ends_an_episode_unless_it_is_to_go_on(end_on_success, steps, why):
    world = KeptWorld(_Solved(make_env("pusht", False)), episode_s=1.0, end_on_success=end_on_success)
    for k in range(11):
        world.answer([50.0, 50.0], START + k * STEP + 1e-6)
    episode = world.ended[0]
    assert (episode.ended, len(episode.actions), episode.success, episode.score) == (why, steps, True, 1.0)


def test_an_emergency_stop_holds_the_robot_where_it_is_and_time_goes_on():
    world = KeptWorld(episode_s=5.0)
    world.answer([500.0, 10.0], START)
    world.advance(START + 2.5 * STEP)
    world.stop(START + 2.5 * STEP)
    place_then = world.observe(START + 2.6 * STEP)[0][:2]
    agent = world.observe(START + 4.0)[0][:2]
    assert np.linalg.norm(agent - place_then) < 15  # it has momentum
    assert np.linalg.norm(agent - [500.0, 10.0]) > 50
    world.advance(START + 5.2)
    assert (world.ended[0].stops, world.ended[0].ended) == (1, "time")


def test_a_stop_before_the_first_action_works_waits():
    world = KeptWorld(action_delay_s=0.5)
    world.answer([10.0, 10.0], START)
    world.stop(START + 0.1)
    world.advance(START + 3.0)
    assert world.episode.actions == []
    world.act(START + 3.0, np.array([10.0, 10.0]))
    world.advance(START + 3.75)
    assert world.episode.fresh[0]


def test_closing_ends_what_is_under_way():
    world = KeptWorld()
    world.answer([10.0, 10.0], START)
    world.advance(START + 0.55)
    world.close()
    assert [(episode.ended, len(episode.actions)) for episode in world.ended] == [("disconnected", 5)]
