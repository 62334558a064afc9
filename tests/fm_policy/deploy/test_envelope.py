"""What the safety envelope refuses and limits."""

import logging
import math

import numpy as np
import pytest

from fm_policy.deploy.envelope import ConfigurationError, Envelope, Limits

FEATURES = {
    "observation.state": {"kind": "numbers", "shape": [2]},
    "observation.images.top": {"kind": "image", "shape": [4, 6, 3]},
}
LIMITS = {"low": [-1.0, 0.0], "high": [1.0, 10.0], "step": [0.5, 2.0]}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def envelope(clock, **limits) -> Envelope:
    return Envelope(FEATURES, Limits(**(LIMITS | limits)), clock)


def observation(seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    picture = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
    return {"observation.state": [0.1, 0.2], "observation.images.top": picture} | changes


def state(*numbers) -> dict:
    return {"observation.state": np.array(numbers)}


# Observations


def test_an_observation_is_copied_and_its_numbers_become_float32(clock):
    seen = observation()
    frame = envelope(clock).admit(seen | {"task": "push"})
    assert set(frame) == set(FEATURES)
    assert frame["observation.state"].dtype == np.float32
    np.testing.assert_array_equal(frame["observation.state"], np.array([0.1, 0.2], np.float32))
    seen["observation.images.top"][:] = 0
    assert frame["observation.images.top"].any()


MISFITS = {
    "a feature is missing": ({"observation.state": None}, "lacks 'observation.state'"),
    "wrong shape": (state(1.0, 2.0, 3.0), r"'observation.state' must be real numbers \(2,\), got float64 \(3,\)"),
    "no array": ({"observation.state": [[1.0], [2.0, 3.0]]}, "'observation.state' is no array"),
    "text": ({"observation.state": ["a", "b"]}, "'observation.state' must be real numbers"),
    "truth values": (state(True, False), "must be real numbers"),
    "float picture": ({"observation.images.top": np.zeros((4, 6, 3))}, "must be uint8"),
    "channels first": ({"observation.images.top": np.zeros((3, 4, 6), np.uint8)}, r"uint8 \(4, 6, 3\)"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_robot_that_does_not_fit_is_an_error_and_later_an_event(change, message, clock):
    guard = envelope(clock)
    with pytest.raises(ConfigurationError, match=message):
        guard.admit(observation() | change)
    assert guard.admit(observation()) is not None
    assert guard.admit(observation() | change) is None
    assert guard.events == {"misfit": 1}


def test_no_observation_at_all(clock):
    guard = envelope(clock)
    with pytest.raises(ConfigurationError, match="lacks"):
        guard.admit(None)
    guard.admit(observation())
    assert guard.admit(None) is None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_are_not_finite_in_single_precision_are_refused(number, clock):
    guard = envelope(clock)
    assert guard.admit(observation() | state(0.0, number)) is None
    assert guard.events == {"not_finite": 1}


@pytest.mark.parametrize(
    ("age", "admitted"), [(0.0, True), (0.5, True), (0.6, False), (-0.6, False), (math.nan, False)]
)
def test_an_observation_is_stale_by_its_timestamp(age, admitted, clock):
    guard = envelope(clock)
    assert (guard.admit(observation(), clock.now - age) is not None) == admitted
    assert guard.events["stale"] == (not admitted)


def test_no_limit_of_the_age(clock):
    assert envelope(clock, max_age=None).admit(observation(), clock.now - 1e6) is not None


def test_a_camera_that_repeats_itself_is_frozen_until_it_changes(clock):
    guard = envelope(clock)
    answers = []
    for tick, picture in enumerate([0, 0, 0, 0, 1, 1]):
        clock.now = 100 + 0.4 * tick
        answers.append(guard.admit(observation(picture)) is not None)
    assert answers == [True, True, True, False, True, True]  # at 1.2 s
    assert guard.events == {"frozen": 1}


def test_numbers_may_repeat_themselves(clock):
    guard = Envelope({"observation.state": FEATURES["observation.state"]}, Limits(**LIMITS), clock)
    for _ in range(3):
        clock.now += 10
        assert guard.admit(state(0.0, 0.0)) is not None


def test_a_clock_that_jumps_back_is_counted_and_starts_the_measures_anew(clock):
    guard = envelope(clock, velocity=[1.0, 1.0])
    guard.reset(start=[0.0, 5.0])
    clock.now = 100.9
    assert guard.admit(observation()) is not None
    clock.now = 50.0
    assert guard.admit(observation(), timestamp=50.0) is not None
    np.testing.assert_array_equal(guard.limit(np.array([1.0, 5.0])), [0.0, 5.0])  # no time has passed
    clock.now = 50.9  # the picture has repeated itself for 0.9 s of the new time
    assert guard.admit(observation(), timestamp=50.9) is not None
    np.testing.assert_allclose(guard.limit(np.array([1.0, 5.0])), [0.5, 5.0])
    assert guard.events == {"clock": 1, "step_limited": 2}


def test_a_clock_that_jumps_forward_makes_observations_stale_and_a_picture_frozen_until_the_next_one(clock):
    guard = envelope(clock)
    assert guard.admit(observation(0), timestamp=100.0) is not None
    clock.now += 3600
    assert guard.admit(observation(1), timestamp=100.1) is None  # made before the jump
    assert guard.admit(observation(1), timestamp=clock.now) is not None
    clock.now += 3600
    assert guard.admit(observation(1), timestamp=clock.now) is None
    assert guard.admit(observation(2), timestamp=clock.now) is not None
    assert guard.events == {"stale": 1, "frozen": 1}


# Actions


def test_an_action_within_the_limits_is_left_as_it_is(clock):
    guard = envelope(clock)
    for action in ([0.1, 0.3], [0.3, 2.2], [-0.1, 4.1]):
        np.testing.assert_array_equal(guard.limit(np.array(action, np.float32)), np.array(action, np.float32))
    assert guard.events == {}


def test_actions_are_clipped_then_brought_near_the_last_one(clock):
    guard = envelope(clock)
    np.testing.assert_array_equal(guard.limit(np.array([7.0, -3.0])), [1.0, 0.0])
    np.testing.assert_array_equal(guard.limit(np.array([-7.0, 1.0])), [0.5, 1.0])
    assert guard.events == {"clipped": 2, "step_limited": 1}


def test_the_first_step_is_measured_from_the_start(clock):
    guard = envelope(clock)
    guard.reset(start=[0.0, 0.0])
    np.testing.assert_array_equal(guard.limit(np.array([1.0, 10.0])), [0.5, 2.0])
    guard.reset()
    np.testing.assert_array_equal(guard.limit(np.array([1.0, 10.0])), [1.0, 10.0])


@pytest.mark.parametrize("start", [[2.0, 0.0], [math.nan, 0.0], [0.0]])
def test_a_robot_that_rests_outside_of_the_range_may_not_start(start, clock):
    guard = envelope(clock)
    guard.reset(start=[0.5, 1.0])
    with pytest.raises(ConfigurationError, match="the robot must start within"):
        guard.reset(start=start)
    # Whoever goes on all the same is limited as before, and gets no number that was refused.
    np.testing.assert_array_equal(guard.limit(None), [0.5, 1.0])
    np.testing.assert_array_equal(guard.limit(np.array([1.0, 10.0])), [1.0, 3.0])


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf])
def test_a_clock_that_tells_no_time_stands_still(time, clock):
    guard = envelope(clock, velocity=[1.0, 100.0])
    guard.reset(start=[0.0, 0.0])
    clock.now, before = time, clock.now
    np.testing.assert_array_equal(guard.limit(np.array([1.0, 1.0])), [0.0, 0.0])
    assert guard.admit(observation(), timestamp=before) is not None
    clock.now = before + 0.1
    np.testing.assert_allclose(guard.limit(np.array([1.0, 1.0])), [0.1, 1.0])
    assert guard.events == {"clock": 2, "step_limited": 2}


@pytest.mark.parametrize("action", [[0.1], [[0.1, 0.2]], [0.1, 0.2, 0.3], 0.1, "go", [[0.1], [0.2, 0.3]]])
def test_what_is_no_action_holds_the_last_one(action, clock):
    guard = envelope(clock)
    assert guard.limit(action) is None
    guard.limit(np.array([0.5, 1.0]))
    np.testing.assert_array_equal(guard.limit(action), [0.5, 1.0])
    assert guard.events == {"action_misfit": 2}


def test_velocity_is_per_second_and_below_the_step(clock):
    guard = envelope(clock, velocity=[1.0, 100.0])
    guard.reset(start=[0.0, 0.0])
    clock.now += 0.1
    np.testing.assert_allclose(guard.limit(np.array([1.0, 10.0])), [0.1, 2.0])
    clock.now += 10.0
    np.testing.assert_allclose(guard.limit(np.array([1.0, 10.0])), [0.6, 4.0])


def test_an_action_that_is_not_finite_holds_the_last_one(clock):
    guard = envelope(clock)
    assert guard.limit(np.array([math.nan, 0.0])) is None
    guard.limit(np.array([0.5, 1.0]))
    np.testing.assert_array_equal(guard.limit(np.array([0.0, math.inf])), [0.5, 1.0])
    np.testing.assert_array_equal(guard.limit(None), [0.5, 1.0])
    assert guard.events == {"action_not_finite": 2}


def test_the_answer_cannot_be_used_to_change_the_last_action(clock):
    guard = envelope(clock)
    guard.limit(np.array([0.5, 1.0]))[:] = 9.0
    np.testing.assert_array_equal(guard.last, [0.5, 1.0])


def test_events_are_logged(clock, caplog):
    guard = envelope(clock)
    with caplog.at_level(logging.INFO):
        guard.admit(observation() | state(math.nan, 0.0))
        guard.limit(np.array([7.0, 1.0]))
    levels = [(record.levelname, record.message.partition(":")[0]) for record in caplog.records]
    assert levels == [("WARNING", "not_finite"), ("INFO", "clipped")]


# Limits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": [2.0, 0.0]}, "low must not exceed high"),
        ({"high": [1.0]}, "high needs a finite number"),
        ({"high": [1.0, math.nan]}, "high needs a finite number"),
        ({"step": [-1.0, 1.0]}, "step must not be negative"),
        ({"velocity": [1.0]}, "velocity needs a finite number"),
        ({"max_age": 0.0}, "max_age must be positive"),
        ({"deadline": math.inf}, "deadline must be positive and finite"),
        ({"fallback": "stop"}, r"fallback must be one of \['hold', 'rest', 'zero'\], got 'stop'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        Limits(**(LIMITS | changes))
