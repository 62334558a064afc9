"""The check in front of the normaliser: what it refuses, in which words, and what it lets pass."""

import re

import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

from fm_policy.assets import default_policy
from fm_policy.contract import ObservationCheckStep
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors


@pytest.fixture
def preprocessor(tiny):
    """Of two vectors and two cameras, 32 x 32 pixels, with statistics, which the normaliser needs to fail."""
    config = tiny.config(input_features={**tiny.VECTORS, **tiny.CAMERAS})
    stats = {name: {"min": -torch.ones(ft.shape), "max": torch.ones(ft.shape)} for name, ft in tiny.VECTORS.items()}
    stats |= {name: {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)} for name in tiny.CAMERAS}
    return make_fm_ft_pre_post_processors(config, stats)[0]


@pytest.fixture
def observation(tiny):
    features = {**tiny.VECTORS, **tiny.CAMERAS}
    return {name: torch.zeros(ft.shape) for name, ft in features.items()}


MISFITS = {
    "missing": ({"observation.environment_state": None}, "'observation.environment_state' is missing"),
    "a camera missing": ({"observation.images.wrist": None}, "'observation.images.wrist' is missing"),
    "more motors": (
        {"observation.state": torch.zeros(18)},
        "'observation.state' has the shape (1, 18), which must end in (2,)",
    ),
    "one motor, which would broadcast": ({"observation.state": torch.zeros(1)}, "(1, 1), which must end in (2,)"),
    "a number": ({"observation.state": torch.tensor(0.0)}, "(), which must end in (2,)"),
    "channels last": (
        {"observation.images.top": torch.zeros(32, 32, 3)},
        "(1, 32, 32, 3), which must end in (3, any, any)",
    ),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS)
def test_another_robots_observation_is_refused_with_what_came_and_what_is_expected(
    preprocessor, observation, change, words
):
    preprocessor(dict(observation))
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        preprocessor(observation | change)
    assert "The policy observes 'observation.state' (2,), 'observation.environment_state' (5,)" in str(refusal.value)


def test_all_that_does_not_fit_is_told_at_once(preprocessor, observation):
    change = {"observation.state": torch.zeros(7), "observation.images.top": None}
    with pytest.raises(ValueError, match=r"\(1, 7\).*'observation.images.top' is missing"):
        preprocessor(observation | change)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_an_observation_that_is_not_finite_is_refused(preprocessor, observation, number):
    with pytest.raises(ValueError, match=r"NaN or infinity in \['observation.images.top'\]"):
        preprocessor(observation | {"observation.images.top": torch.full((3, 32, 32), number)})


def test_windows_pictures_of_any_size_and_further_features_pass(preprocessor, observation):
    windows = {name: value.expand(4, 2, *value.shape) for name, value in observation.items()}
    further = {"observation.images.top": torch.zeros(4, 3, 48, 64), "observation.images.left": torch.zeros(4, 1, 2)}
    batch = preprocessor(windows | further | {"action": torch.zeros(4, 16, 3)})
    assert batch["observation.images.top"].shape == (4, 3, 48, 64)
    assert torch.equal(batch["observation.state"], torch.zeros(4, 2, 2))


def test_a_camera_under_another_name_passes_when_it_is_renamed(preprocessor, observation, tmp_path, tiny):
    preprocessor.save_pretrained(tmp_path)
    make_fm_ft_pre_post_processors(tiny.config())[1].save_pretrained(tmp_path)
    renames = {"rename_observations_processor": {"rename_map": {"observation.images.front": "observation.images.top"}}}
    loaded, _ = make_pre_post_processors(tiny.config(), str(tmp_path), preprocessor_overrides=renames)
    given = {name.replace(".top", ".front"): value for name, value in observation.items()}
    assert "observation.images.top" in loaded(given)
    with pytest.raises(ValueError, match=r"'observation.state' has the shape \(1, 3\)"):
        loaded(given | {"observation.state": torch.zeros(3)})


def test_the_shipped_checkpoint_has_the_check_of_its_own_features():
    checkpoint = load_checkpoint(default_policy())
    (step,) = (step for step in checkpoint.preprocessor.steps if isinstance(step, ObservationCheckStep))
    assert step.get_config() == ObservationCheckStep.of(checkpoint.policy.config.input_features).get_config()
    with pytest.raises(
        ValueError, match=r"'observation.state' has the shape \(1, 18\).*'observation.environment_state' is missing"
    ):
        checkpoint.preprocessor({"observation.state": torch.zeros(18)})
